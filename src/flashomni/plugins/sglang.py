"""SGLang Diffusion: ``FLASHOMNI_RECIPE=balanced sglang serve --backend diffusers ...``.

By the entry point group ``sglang.multimodal_gen.plugins``. SGLang calls :func:`activate` in its
launcher and in every worker, before a model is loaded, and wraps by itself what is named there.
"""

from __future__ import annotations

from typing import Any

from flashomni.plugins._asked import asked, loudly, put_on

TRIED = "0.5.23"
_RUNTIME = "sglang.multimodal_gen.runtime"
# Runs when the weights are where they compute, and before the transformer is compiled.
LOADED = f"{_RUNTIME}.pipelines.diffusers_pipeline.DiffusersPipeline._apply_cache_dit"
# Every pipeline's constructor but that one's.
NATIVE = f"{_RUNTIME}.pipelines_core.composed_pipeline_base.ComposedPipelineBase.__init__"


def activate() -> None:
    """Have SGLang accelerate the pipelines that it loads; without ``FLASHOMNI_RECIPE``, nothing."""
    recipe = asked("sglang", TRIED)
    if recipe is None:
        return
    from sglang.multimodal_gen.runtime.platforms.plugins import HookType, plugin_hook

    @plugin_hook(LOADED, HookType.AFTER)
    def accelerated(pipe: Any, self: Any, given: Any, server_args: Any) -> Any:
        with loudly(recipe):
            if server_args.cache_dit_config:
                raise NotImplementedError("--cache-dit-config has the same blocks: leave it out")
        put_on(pipe, recipe)
        return pipe

    @plugin_hook(NATIVE, HookType.BEFORE)
    def refused(self: Any, *args: Any, **kwargs: Any) -> None:
        with loudly(recipe):
            raise NotImplementedError(
                f"{type(self).__name__} is SGLang's own, whose blocks FlashOmni does not know: "
                "pass --backend diffusers"
            )
