"""Parts of ``tools/methods.py``: what is asked of a model, who makes pictures, the page."""
