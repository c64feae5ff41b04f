"""Output projection of the live heads, plus the forecast of the cached ones."""
