"""What an adapter relies on: modules that it takes apart, and that are therefore never called.

Whatever changes what calling such a module does (another class, a hook, a forward of its own, an
attention processor, backend or parallel plan) would be left out silently. So each is refused by
name, when a model is accelerated and again at the start of each generation.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Any, NamedTuple

from flashomni.engine.linear import is_stock

PROCESSOR = "an attention processor"
BLOCK = "a block"  # which is called, and runs through the engine: hooks on it are seen elsewhere


class Reliance(NamedTuple):
    """One module that is taken apart.

    Args:
        name: its path in the model.
        module: the module, or an attention's processor.
        classes: names of the torch or diffusers classes that are understood; empty for any.
        why: what the adapter does with it instead of calling it.
    """

    name: str
    module: Any
    classes: tuple[str, ...]
    why: str


def rely_on_attention(
    name: str, attn: Any, classes: tuple[str, ...], *processors: str
) -> list[Reliance]:
    """Reliance on an attention module and its processor.

    Args:
        name: path of the attention module.
        classes: that its class may have.
        processors: names of the classes that its processor may have.
    """
    return [
        Reliance(f"{name}.processor", attn.processor, processors, PROCESSOR),
        Reliance(name, attn, classes, "its projections are called one by one"),
    ]


def verify(reliances: Iterable[Reliance]) -> None:
    """Check all of them; reads attributes only.

    Raises:
        NotImplementedError: one is not what the adapter takes it for; the message names it.
    """
    for each in reliances:
        if each.why == PROCESSOR:
            _verify_processor(each)
            continue
        if each.classes and not is_stock(each.module, *each.classes):
            raise NotImplementedError(
                f"{each.name}: {_origin(each.module)} is not supported, only diffusers' own "
                f"{' or '.join(each.classes)} is ({each.why})"
            )
        hook = None if each.why == BLOCK else _hook(each.module)
        if hook is not None:
            raise NotImplementedError(
                f"{each.name} carries {hook}, which would be left out: {each.why}. Remove it first"
            )


def _verify_processor(each: Reliance) -> None:
    processor, block = each.module, each.name.removesuffix(".processor").rpartition(".")[0]
    if not is_stock(processor, *each.classes):
        raise NotImplementedError(
            f"{block}: attention processor {_origin(processor)} is not supported, only diffusers' "
            f"own {each.classes[0]} is (unload an IP-Adapter, or set the default processor)"
        )
    backend = getattr(processor, "_attention_backend", None)
    if backend is not None:
        raise NotImplementedError(
            f"{block}: attention backend {getattr(backend, 'value', backend)!r} is set, but an "
            "accelerated model uses its own attention; call "
            "transformer.reset_attention_backend(), or accelerate anew: set before, it is kept"
        )


def _origin(thing: Any) -> str:
    """The class of a thing, with its module where the name alone would mislead."""
    cls = type(thing)
    return cls.__name__ if cls.__module__ == "builtins" else f"{cls.__name__} of {cls.__module__}"


def _hook(module: Any) -> str | None:
    """What would run beside the forward of a module's class if it were called, in words."""
    found = list(getattr(getattr(module, "_diffusers_hook", None), "hooks", ()))
    if getattr(module, "_hf_hook", None) is not None:
        found.append(type(module._hf_hook).__name__)
    if found:
        return f"the hook {', '.join(found)}"
    if module._forward_hooks or module._forward_pre_hooks:
        return "a forward hook"
    own = module.__dict__.get("forward")  # a disabled diffusers cache leaves the class's
    if own is None or own == types.MethodType(type(module).forward, module):
        return None
    return "a forward of its own"
