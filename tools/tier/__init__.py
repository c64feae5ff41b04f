"""Parts of ``tools/tiers.py``: the models that it compares."""
