"""What diffusers offers by itself: eager, compiled blocks, its attention backends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

COMPILE: dict[str, Any] = {"fullgraph": True}


@dataclass
class Stock:
    """The stock transformer in one of its settings.

    Args:
        attention: diffusers' name of the attention backend.
        compiled: whether repeated blocks are compiled, as ``compile_repeated_blocks`` does.
    """

    attention: str = "native"
    compiled: bool = False
    _blocks: dict[nn.Module, Any] = field(default_factory=dict, repr=False)

    @contextmanager
    def attached(self, *models: Any) -> Iterator[None]:
        """Put it on the transformers of a pipeline, and take it off whatever happens.

        What was compiled is kept here for the next time, not on the model.

        Raises:
            RuntimeError: the attention backend is not installed.
            ValueError: diffusers does not know it.
        """
        from diffusers.models.attention_dispatch import attention_backend

        limit = torch._dynamo.config.patch(recompile_limit=64)
        try:
            # Setting a model's backend also changes the process's; leaving this restores that.
            with attention_backend(self.attention), limit:
                if self.attention != "native":
                    for model in models:
                        model.set_attention_backend(self.attention)
                if self.compiled:
                    self._compile(*models)
                yield
        finally:
            for block in (block for model in models for block in model.modules()):
                block.__dict__.pop("_compiled_call_impl", None)
                processor: Any = getattr(block, "processor", None)
                if processor is not None:  # reset_attention_backend would leave a None behind
                    vars(processor).pop("_attention_backend", None)

    def _compile(self, *models: Any) -> None:
        if not self._blocks:
            for model in models:
                model.compile_repeated_blocks(**COMPILE)
            self._blocks = {
                block: block.__dict__["_compiled_call_impl"]
                for model in models
                for block in model.modules()
                if "_compiled_call_impl" in block.__dict__
            }
        for block, call in self._blocks.items():
            block._compiled_call_impl = call


def stocks() -> dict[str, Stock]:
    """Every baseline by the name that users write."""
    return {
        "eager": Stock(),
        "cudnn": Stock("_native_cudnn"),
        "compiled": Stock("_native_cudnn", compiled=True),
        "compiled-native": Stock(compiled=True),
        "fa3": Stock("_flash_3"),
        "fa4": Stock("flash_4_hub"),
    }


def make_stocks(names: list[str]) -> dict[str, Stock]:
    """The baselines that were asked for, each once.

    Raises:
        ValueError: no such baseline.
    """
    known = stocks()
    for name in names:
        if name not in known:
            raise ValueError(f"baseline must be one of {', '.join(known)}, got {name!r}")
    return {name: known[name] for name in dict.fromkeys(names)}


def check_restored(name: str, model: nn.Module) -> None:
    """Tidy a transformer after a method, and see that it is as it was built.

    Raises:
        RuntimeError: the method has left something on it.
    """
    tidy(model)
    left = leftovers(model)
    if left:
        raise RuntimeError(f"{name} has left on the model: {'; '.join(left[:5])}")


def tidy(model: nn.Module) -> None:
    """Remove what diffusers' caches leave when they are disabled: empty registries, own forwards.

    Neither does anything, but a block that was compiled before would be compiled anew for them.
    """
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        forward = module.__dict__.get("forward")
        if registry is not None and not registry.hooks:
            del module._diffusers_hook
        if getattr(forward, "__func__", None) is type(module).forward:
            del module.forward


def leftovers(model: nn.Module) -> list[str]:
    """What a method has left on a transformer; empty when it is as it was built."""
    found = []
    for name, module in model.named_modules():
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", None)
        processor = getattr(module, "processor", None)
        if hooks:
            found.append(f"{name}: hook {', '.join(hooks)}")
        if "forward" in module.__dict__:
            found.append(f"{name}: a forward of its own")
        if module._forward_hooks or module._forward_pre_hooks:
            found.append(f"{name}: a forward hook")
        if getattr(module, "_compiled_call_impl", None) is not None:
            found.append(f"{name}: is compiled")
        backend = getattr(processor, "_attention_backend", None)
        if backend is not None:
            found.append(f"{name}: attention backend {backend}")
    return found
