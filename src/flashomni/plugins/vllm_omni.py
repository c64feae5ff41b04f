"""vLLM-Omni: ``FLASHOMNI_RECIPE=balanced vllm serve ... --omni --diffusion-load-format diffusers``.

By the entry point group ``vllm_omni.general_plugins``, whose functions vLLM-Omni calls in every
process before a model is loaded. It has no hooks: a plug-in puts its own in the place of what it
changes, here around the loader of diffusion pipelines, and only where a recipe is asked for.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from flashomni.models import transformers_of
from flashomni.plugins._asked import asked, loudly, put_on

TRIED = "0.30.0"


def activate() -> None:
    """Have vLLM-Omni accelerate what it loads; without ``FLASHOMNI_RECIPE``, nothing.

    It may be called again in the same process, as vLLM-Omni asks of plug-ins.
    """
    recipe = asked("vllm-omni", TRIED)
    if recipe is None:
        return
    # vLLM-Omni's own loggers do the same: none but vLLM's has a handler.
    logging.getLogger("flashomni").parent = logging.getLogger("vllm")
    from vllm_omni.diffusion.model_loader.diffusers_loader import DiffusersPipelineLoader

    load = DiffusersPipelineLoader.load_model
    if "flashomni" in load.__dict__:
        return

    @functools.wraps(load)
    def load_model(
        self: Any, load_device: str, load_format: Any = "default", *args: Any, **kwargs: Any
    ) -> Any:
        with loudly(recipe):
            if load_format != "diffusers":
                raise NotImplementedError(
                    f"load format {load_format!r} is of pipelines whose blocks FlashOmni does not "
                    "know: pass --diffusion-load-format diffusers"
                )
        adapter = load(self, load_device, load_format, *args, **kwargs)
        pipe = adapter._pipeline
        if self.od_config.diffusion_attention_config.default is None:
            # Not the user's choice, which the engine would keep, but what vLLM-Omni found.
            models: dict[str, Any] = dict(transformers_of(pipe))
            for model in models.values():
                model.set_attention_backend("native")  # diffusers' own, for all of the process
                model.reset_attention_backend()
        put_on(pipe, recipe)
        return adapter

    load_model.__dict__["flashomni"] = recipe
    DiffusersPipelineLoader.load_model = load_model
