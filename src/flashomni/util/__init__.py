"""Files, settings: what has nothing to do with diffusion."""
