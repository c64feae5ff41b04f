"""Speed of the ops, as ratios within one run: correctness first, baselines interleaved, medians."""

from flashomni.bench.plot import draw
from flashomni.bench.problems import PROBLEMS, Baseline, Problem
from flashomni.bench.shapes import SHAPES, Shape, random_symbols
from flashomni.bench.table import Row, measure, save, tabulate

__all__ = [
    "PROBLEMS",
    "SHAPES",
    "Baseline",
    "Problem",
    "Row",
    "Shape",
    "draw",
    "measure",
    "random_symbols",
    "save",
    "tabulate",
]
