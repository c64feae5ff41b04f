"""Whether the calls of a model can be recorded, and what recordings rely on beside inputs."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from flashomni.engine.learner import Learner
from flashomni.engine.recipe import Recipe
from flashomni.parallel import Ranks


def why_none(recipe: Recipe, learner: Learner | None) -> str:
    """Why no call under a recipe can be recorded; empty if that is not known before."""
    schedule = recipe.schedule
    if learner is not None:
        return "the model has no adapter, and is learned while it runs"
    if recipe.storage.history_device == "host":
        return "histories are kept on the host"
    if recipe.guidance.acts:
        return "guidance leaves whole branches out"
    if schedule.decides or schedule.learns or schedule.measures:
        return f"schedule {schedule.name!r} looks at values inside the steps"
    return ""


def why_not_spread(
    mode: bool | str, sequence: Ranks | None, branches: Ranks | None, device: torch.device
) -> str:
    """Why no call can be recorded that several processes share; empty if they can, or none do.

    A recording of exchanges holds the process group: NCCL does not end before it is dropped, and
    waits for ever if nobody does. So it is for those who ask for it.

    Args:
        mode: of the graphs.
        sequence: ranks that share the sequence.
        branches: ranks that share the conditioning branches.
        device: where the model computes.
    """
    if branches is not None:
        return "the branches are shared out among ranks"
    if sequence is None:
        return ""
    if mode == "auto":
        return "the sequence is spread over ranks; graphs=True records it all the same"
    if torch.device(sequence.device).type != device.type:
        return f"the ranks exchange by way of {sequence.device}"
    return ""


def modes() -> tuple:
    """What of torch's state changes what a call does."""
    return (
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
        torch.get_float32_matmul_precision(),
    )


def look_at(model: nn.Module, ours: Callable[[Any], bool]) -> tuple[str, Hashable]:
    """Why the calls of a model cannot be recorded, and what they rely on: where its weights lie."""
    places: list[int] = []
    if model.training:
        return "the model is in training mode", None
    for name, module in model.named_modules():
        what = _refuse_module(module, ours)
        if what:
            return f"{name or type(model).__name__} {what}", None
        places.append(id(type(module)))
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and type(tensor.data) is not Tensor:
                return f"{name} holds a {type(tensor.data).__name__}", None
            places.append(0 if tensor is None else tensor.data_ptr())
    return "", tuple(places)


def _refuse_module(module: nn.Module, ours: Callable[[Any], bool]) -> str:
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    if not all(map(ours, hooks)):
        return "carries a forward hook"
    for slot in ("forward", "_old_forward"):
        stand_in = module.__dict__.get(slot)
        if stand_in is not None and not ours(stand_in):
            return "carries a hook"
    if getattr(module, "_hf_hook", None) is not None:
        return "is offloaded or hooked by accelerate"
    if not all(map(ours, getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values())):
        return "carries a hook of diffusers"
    if getattr(module, "_compiled_call_impl", None) is not None:
        return "is compiled"
    if type(module).__module__.partition(".")[0] == "peft":
        return "is a LoRA layer"
    return ""
