"""Where small models of transformer classes come from: this repository and diffusers' tests."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flashomni.models import adapters
from matrix.more import MORE

sys.path.append(str(Path(__file__).parents[2] / "tests" / "unit"))
from tiny_models import TINY, build, fill_gates

Made = tuple[nn.Module, dict[str, Any]]
OURS = "ours"


def classes() -> dict[str, type[nn.Module]]:
    """Every transformer class of this diffusers, by name."""
    from diffusers.models import transformers

    names = [name for name in dir(transformers) if not name.startswith("_")]
    found = {name: getattr(transformers, name) for name in names}
    return {
        name: cls
        for name, cls in found.items()
        if inspect.isclass(cls) and cls.__module__.startswith(transformers.__name__)
    }


def sources(tests: Path | None) -> Iterator[tuple[str, str, Callable[[], Made]]]:
    """Class, source, and what makes a small model and the arguments of a call.

    Args:
        tests: the folder that holds diffusers' ``tests``; ``None`` for this repository's only.
    """
    ours: dict[str, Callable[[], Made]] = {name: partial(build, name) for name in TINY}
    for name in adapters():
        ours.setdefault(name, partial(of_adapter, name))
    for name, make in MORE.items():
        ours.setdefault(name, partial(of_more, make))
    for name, make in sorted(ours.items()):
        yield name, OURS, make
    if tests is not None:
        for name, config in configs(tests):
            yield name, config.__name__.removesuffix("TesterConfig"), partial(of_config, config)


def of_adapter(name: str) -> Made:
    """The small model that an adapter brings along."""
    torch.manual_seed(0)
    model, inputs = adapters()[name].tiny()
    return filled(model), dict(inputs)


def of_more(make: Callable[[], Made]) -> Made:
    """A model that is small here alone."""
    torch.manual_seed(0)
    model, inputs = make()
    return filled(model), inputs


def of_config(config: type) -> Made:
    """A model of diffusers' model tests."""
    torch.manual_seed(0)
    made = config()
    model = made.model_class(**made.get_init_dict())
    return filled(model), dict(made.get_dummy_inputs())


def filled(model: nn.Module) -> nn.Module:
    """Random values for gates that begin with zero: otherwise blocks change nothing."""
    fill_gates(model)
    return model.eval()


def configs(tests: Path) -> Iterator[tuple[str, type]]:
    """Class, and how its tests build it; quantised weights are no classes of their own."""
    folder = Path(tests) / "tests" / "models" / "transformers"
    if not folder.is_dir():
        raise ValueError(f"tests must hold tests/models/transformers, got {tests}")
    sys.path.insert(0, str(tests))
    seen = set()
    for path in sorted(folder.glob("test_*.py")):
        try:
            module = importlib.import_module(f"tests.models.transformers.{path.stem}")
        except Exception as error:
            print(f"{path.name}: not read, {type(error).__name__}: {str(error)[:120]}")
            continue
        for name, cls in vars(module).items():
            if not name.endswith("TesterConfig") or cls.__module__ != module.__name__:
                continue
            if not hasattr(cls, "get_init_dict") or "Quant" in name or "SDNQ" in name:
                continue
            model = cls().model_class
            if model is not None and cls not in seen:
                seen.add(cls)
                yield model.__name__, cls
