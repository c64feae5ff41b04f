"""What ``accelerate`` would do to a pipeline's folder, without its weights."""

from __future__ import annotations

import importlib
import json
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flashomni.models._accelerate import COMPONENTS, _find

INDEX, CONFIG = "model_index.json", "config.json"


@dataclass(frozen=True)
class Foreseen:
    """What would happen to one transformer.

    Attributes:
        component: its name in the pipeline.
        transformer: its class.
        tier: ``adapter``, ``declared`` or ``generic``; empty if it is refused.
        blocks: how many blocks each list has.
        parameters: of the whole transformer.
        weight_bytes: of its files in the folder; 0 without any.
        inner: numbers of a token between the blocks: heads times head_dim; 0 if its configuration
            does not say.
        notes: what deserves attention.
        refused: why it would not be accelerated.
    """

    component: str
    transformer: str
    tier: str = ""
    blocks: dict[str, int] = field(default_factory=dict)
    parameters: int = 0
    weight_bytes: int = 0
    inner: int = 0
    notes: tuple[str, ...] = ()
    refused: str = ""


def foresee(folder: str | Path) -> list[Foreseen]:
    """What would happen to each transformer of a diffusers pipeline, or to a single one.

    Classes are built of their configurations without memory for weights; files with weights are
    not read.

    Args:
        folder: one that ``save_pretrained`` wrote, of a pipeline or of a transformer.

    Raises:
        ValueError: it is no such folder, or its pipeline has no transformer.
    """
    root = Path(folder)
    index = _read(root / INDEX)
    if index is None:
        config = _read(root / CONFIG)
        if config is None or "_class_name" not in config:
            raise ValueError(
                f"folder must be one of a diffusers pipeline or transformer, with {INDEX} or "
                f"{CONFIG}; got {root}"
            )
        return [_one(COMPONENTS[0], config["_class_name"], root)]
    named = {name: index[name] for name in COMPONENTS if index.get(name)}
    found = [_one(name, said[1], root / name) for name, said in named.items() if said[1]]
    if not found:
        raise ValueError(
            f"folder must be of a pipeline with a transformer; {root} is of a "
            f"{index.get('_class_name', 'pipeline')} with {', '.join(_parts(index)) or 'no parts'}"
        )
    return found


def _one(component: str, name: str, folder: Path) -> Foreseen:
    from flashomni.models.generic.tier import Generic  # which loads diffusers

    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    cls = getattr(importlib.import_module("diffusers"), name, None)
    config = _read(folder / CONFIG)
    if cls is None or config is None:
        why = "this diffusers has no such class" if cls is None else f"{folder} has no {CONFIG}"
        return Foreseen(component, name, weight_bytes=size, refused=f"{why}; load it to learn more")
    notes = []
    if config.get("quantization_config"):
        notes.append("its weights are quantised: projections are called as they are, never skipped")
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of initialising nothing
        model = cls.from_config({k: v for k, v in config.items() if k != "quantization_config"})
    model.eval()
    inner = _inner(model)
    count = sum(parameter.numel() for parameter in model.parameters())
    known = {"parameters": count, "weight_bytes": size, "inner": inner}
    try:
        adapter = _find(model, None)
        sites = adapter.sites(model)
        adapter.check(model)
    except (ValueError, NotImplementedError) as error:
        return Foreseen(component, name, notes=tuple(notes), refused=str(error), **known)
    if isinstance(adapter, Generic):
        notes += adapter.notes()
    blocks = dict(Counter(site.name.rpartition(".")[0] for site in sites))
    tier = adapter.tier if isinstance(adapter, Generic) else "adapter"
    return Foreseen(component, name, tier, blocks, notes=tuple(notes), **known)


def _inner(model: nn.Module) -> int:
    """Heads times head_dim, where the configuration calls them so."""
    config: Any = getattr(model, "config", {})
    heads, head_dim = config.get("num_attention_heads"), config.get("attention_head_dim")
    return heads * head_dim if isinstance(heads, int) and isinstance(head_dim, int) else 0


def _parts(index: dict[str, Any]) -> list[str]:
    return [name for name, said in index.items() if isinstance(said, list) and said[-1]]


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON file's object; ``None`` if there is no such file.

    Raises:
        ValueError: it is not JSON.
    """
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} must be a JSON object: {error}") from None
