"""Speed of whole generations at real size, against diffusers' own, in one process.

Real pipelines of diffusers, published configurations, random weights: see ``models``.
"""

from flashomni.lab.e2e.breakdown import PartRow, Step, part_rows, profile_all, tabulate_parts
from flashomni.lab.e2e.methods import Plan, parse_method, parse_recipe
from flashomni.lab.e2e.models import MODELS, Model, build
from flashomni.lab.e2e.plot import draw
from flashomni.lab.e2e.run import weights_gib
from flashomni.lab.e2e.session import Results, Session
from flashomni.lab.e2e.sparsity import (
    MODES,
    POINTS,
    SparsityRow,
    recipes_for,
    sweep,
    tabulate_sparsity,
)
from flashomni.lab.e2e.stock import make_stocks
from flashomni.lab.e2e.table import Book, Row, drifts, rows_of, tabulate

__all__ = [
    "MODELS",
    "MODES",
    "POINTS",
    "Book",
    "Model",
    "PartRow",
    "Plan",
    "Results",
    "Row",
    "Session",
    "SparsityRow",
    "Step",
    "build",
    "draw",
    "drifts",
    "make_stocks",
    "parse_method",
    "parse_recipe",
    "part_rows",
    "profile_all",
    "recipes_for",
    "rows_of",
    "sweep",
    "tabulate",
    "tabulate_parts",
    "tabulate_sparsity",
    "weights_gib",
]
