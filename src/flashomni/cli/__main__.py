"""``python -m flashomni.cli``."""

from flashomni.cli import app

app()
