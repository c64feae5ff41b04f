"""Summaries of key blocks: ``op.py`` is the contract and the definition, other files backends."""
