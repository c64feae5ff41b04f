"""What acceleration does to pictures: methods x prompts x seeds -> fidelity against time.

``methods`` says how to generate (a recipe, fewer steps, or a peer from ``peers``), ``campaign``
runs the cases and keeps them on disk, ``table`` sums them up, ``page`` draws them.
"""

from flashomni.evaluation.campaign import Campaign, Case, Result, Scorer
from flashomni.evaluation.methods import Method, parse_method
from flashomni.evaluation.table import Row, save_rows, summarise

__all__ = [
    "Campaign", "Case", "Result", "Scorer",
    "Method", "parse_method",
    "Row", "save_rows", "summarise",
]  # fmt: skip
