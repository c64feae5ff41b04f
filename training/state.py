"""Nested states of a training run in one safetensors file; all but the tensors as JSON."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def save_state(state: Any, path: str | os.PathLike) -> None:
    """Write dicts, lists, numbers, strings and tensors; the file appears whole or not at all."""
    tensors: dict[str, torch.Tensor] = {}

    def strip(value: Any) -> Any:
        """The structure, with the name of each tensor in its place."""
        if isinstance(value, torch.Tensor):
            name = f"t{len(tensors)}"
            # a copy: safetensors refuses tensors that share memory
            tensors[name] = value.detach().cpu().clone().contiguous()
            return {"tensor": name}
        if isinstance(value, dict):
            return {"dict": [[key, strip(item)] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            return {"list": [strip(item) for item in value]}
        return {"plain": value}

    skeleton = json.dumps(strip(state))
    temporary = Path(f"{path}.tmp")
    save_file(tensors, temporary, metadata={"skeleton": skeleton})
    os.replace(temporary, path)


def replace_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Write a folder anew; it appears whole or not at all.

    Args:
        folder: what it is to be; beside it are ``.new`` and ``.old`` meanwhile.
        write: fills the folder that it is given, and makes it.
    """
    new, old = (folder.with_name(folder.name + end) for end in (".new", ".old"))
    for each in (new, old):
        shutil.rmtree(each, ignore_errors=True)
    write(new)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_state(path: str | os.PathLike, device: str) -> Any:
    """What :func:`save_state` wrote; tuples come back as lists."""
    with safe_open(path, framework="pt", device=device) as file:

        def fill(value: dict) -> Any:
            (kind, item), *_ = value.items()
            if kind == "tensor":
                return file.get_tensor(item)
            if kind == "dict":
                return {key: fill(inner) for key, inner in item}
            return [fill(inner) for inner in item] if kind == "list" else item

        return fill(json.loads(file.metadata()["skeleton"]))
