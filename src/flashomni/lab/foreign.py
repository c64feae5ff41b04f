"""Whether the weight files of a pipeline's folder are those of its models.

Libraries load what fits by name and draw the rest at random, with at most a warning: a file of
another model gives noise without an error. Names change between releases, mostly in front; so
weights are told by the last two words of their name and their shape.
"""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

MOST_MISSING = 0.25  # share of a model's tensors; above it the file is of another model
log = logging.getLogger("flashomni")
Weight = tuple[str, tuple[int, ...]]


def check_weights(folder: Path, parts: dict[str, Any]) -> None:
    """Refuse a folder whose files lack the weights of a model; log where few are missing.

    Args:
        folder: of the pipeline; each model has a folder of its name in it.
        parts: the pipeline's components by name.

    Raises:
        ValueError: a file holds the weights of another model.
    """
    for name, part in parts.items():
        files = sorted((folder / name).glob("*.safetensors"))
        if not isinstance(part, torch.nn.Module) or not files or _is_quantised(part):
            continue
        needed = _of_model(part)
        missing = needed - _of_files(files)
        count, total = missing.total(), max(needed.total(), 1)
        if not count:
            continue
        example = next(iter(missing))[0]
        what = (
            f"{count} of the {total} weights of {type(part).__name__} are not in "
            f"{name}/*.safetensors ({example!r} for one)"
        )
        if count > MOST_MISSING * total:
            raise ValueError(f"model {str(folder)!r} has the weights of another model: {what}")
        log.warning("model %s: %s: they are random", folder, what)


def _of_model(part: torch.nn.Module) -> Counter[Weight]:
    """Its parameters, tied ones once, by the names they have in files."""
    return Counter(_weight(name, tuple(p.shape)) for name, p in part.named_parameters())


def _of_files(files: list[Path]) -> Counter[Weight]:
    found: Counter[Weight] = Counter()
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # a safe_open is no dict
                found[_weight(name, tuple(tensors.get_slice(name).get_shape()))] += 1
    return found


def _weight(name: str, shape: tuple[int, ...]) -> Weight:
    return ".".join(name.split(".")[-2:]), shape


def _is_quantised(part: Any) -> bool:
    """Packed weights have other shapes than the model's."""
    config = getattr(part, "config", None)
    return getattr(config, "quantization_config", None) is not None
