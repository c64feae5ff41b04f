"""Training of the two small pipelines that FlashOmni ships (not part of the installed package)."""
