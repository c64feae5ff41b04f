"""The three small trained pipelines of FlashOmni's demo and tests, as diffusers folders."""

from pathlib import Path

ROOT = Path(__file__).parent
NAMES = ("tiny-image", "tiny-video", "tiny-wan")


def folder(name: str) -> Path:
    """Where the pipeline of that name lies.

    Raises:
        ValueError: there is no such pipeline here.
    """
    if name not in NAMES:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
    return ROOT / name
