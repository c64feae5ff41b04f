"""Tune a recipe for a model, a number of steps and a budget; ``flashomni.tune`` is :func:`tune`.

``record`` keeps dense runs, ``gains`` measures what errors become, ``cost`` predicts what a plan
costs and fits forecast weights, ``plan`` finds schedules, ``polish`` tries them on the real output,
``validate`` compares with the ramp on prompts that were kept back, ``page`` shows it.
"""

from flashomni.tuning.run import NotBetterError, Tuned, tune
from flashomni.tuning.settings import Point, Settings

__all__ = ["NotBetterError", "Point", "Settings", "Tuned", "tune"]
