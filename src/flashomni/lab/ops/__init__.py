"""Speed of the ops, as ratios within one run: correctness first, baselines interleaved, medians."""

from flashomni.lab.ops.plot import draw
from flashomni.lab.ops.problems import PROBLEMS, Baseline, Problem
from flashomni.lab.ops.shapes import SHAPES, Shape, random_symbols
from flashomni.lab.ops.table import Row, measure, save, tabulate

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
