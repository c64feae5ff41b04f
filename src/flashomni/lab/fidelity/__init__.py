"""What acceleration does to pictures: methods x prompts x seeds -> fidelity against time.

``methods`` says how to generate (a recipe, fewer steps, or a peer from ``peers``), ``campaign``
runs the cases and keeps them on disk, ``table`` sums them up, ``page`` draws them.
"""

from flashomni.lab.fidelity.campaign import Campaign
from flashomni.lab.fidelity.methods import Method, parse_method
from flashomni.lab.fidelity.result import Case, Result
from flashomni.lab.fidelity.scorers import Scorer
from flashomni.lab.fidelity.table import Row, save_rows, summarise

__all__ = [
    "Campaign", "Case", "Result", "Scorer",
    "Method", "parse_method",
    "Row", "save_rows", "summarise",
]  # fmt: skip
