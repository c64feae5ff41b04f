"""What the plug-ins meet in SGLang 0.5.23 and in vLLM-Omni 0.30.0, in small.

Written from the outside: names, signatures and the order of calls are theirs, no line is.
`make plugins-test` compares the signatures with those of the real packages (`SAME`).
"""

import enum
import sys
from types import ModuleType, SimpleNamespace

RUNTIME = "sglang.multimodal_gen.runtime"
LOADER = "vllm_omni.diffusion.model_loader.diffusers_loader"


class HookType(enum.Enum):
    BEFORE = "before"
    AFTER = "after"
    AROUND = "around"
    REPLACE = "replace"


class ComposedPipelineBase:
    """SGLang's own pipelines."""

    def __init__(self, model_path, server_args, required_config_modules=None, loaded_modules=None,
                 executor=None):  # fmt: skip
        self.loaded = True


class DiffusersPipeline(ComposedPipelineBase):
    """Its base's constructor is not called."""

    def __init__(self, model_path, server_args, required_config_modules=None, loaded_modules=None,
                 executor=None):  # fmt: skip
        self.diffusers_pipe = self._load_diffusers_pipeline(model_path, server_args)

    def _load_diffusers_pipeline(self, model_path, server_args):
        return self._apply_cache_dit(model_path, server_args)  # the path stands for what it holds

    def _apply_cache_dit(self, pipe, server_args):
        return pipe


class DiffusersPipelineLoader:
    """vLLM-Omni's, of its own pipelines and of those of diffusers."""

    def __init__(self, load_config, od_config):
        self.od_config = od_config

    def load_model(self, load_device, load_format="default", custom_pipeline_name=None,
                   device=None):  # fmt: skip
        pipe = self.od_config.model
        if load_format == "diffusers":  # an attention is always set: the best that is there
            chosen = self.od_config.diffusion_attention_config.default
            pipe.transformer.set_attention_backend(chosen or "_native_efficient")
        return SimpleNamespace(_pipeline=pipe)


def plugin_hook(target, type=HookType.AFTER):
    """Takes note of a hook; `apply` below wraps."""

    def decorator(hook):
        sys.modules[f"{RUNTIME}.platforms.plugins"].hooks.append((target, type, hook))
        return hook

    return decorator


def apply(hooks):
    """What SGLang's registry does with the hooks of its plug-ins."""
    for target, kind, hook in hooks:
        path, _, name = target.rpartition(".")
        module, _, owner = path.rpartition(".")
        owner = getattr(sys.modules[module], owner)
        setattr(owner, name, _wrapped(getattr(owner, name), kind, hook))


def _wrapped(original, kind, hook):
    def before(*args, **kwargs):
        args, kwargs = hook(*args, **kwargs) or (args, kwargs)
        return original(*args, **kwargs)

    def after(*args, **kwargs):
        result = original(*args, **kwargs)
        changed = hook(result, *args, **kwargs)
        return result if changed is None else changed

    return {HookType.BEFORE: before, HookType.AFTER: after}[kind]


SAME = {  # what plug-ins use, by where it is in the real packages
    f"{RUNTIME}.platforms.plugins": (plugin_hook,),
    f"{RUNTIME}.pipelines_core.composed_pipeline_base": (ComposedPipelineBase.__init__,),
    f"{RUNTIME}.pipelines.diffusers_pipeline": (
        DiffusersPipeline.__init__,
        DiffusersPipeline._load_diffusers_pipeline,
        DiffusersPipeline._apply_cache_dit,
    ),
    LOADER: (DiffusersPipelineLoader.__init__, DiffusersPipelineLoader.load_model),
}


def install(monkeypatch):
    """Both packages, as modules that plug-ins import; what they change is put back.

    Returns:
        The hooks that plug-ins register with SGLang, for :func:`apply`.
    """
    hooks = []
    for name, uses in SAME.items():
        parts = name.split(".")
        for number in range(1, len(parts) + 1):
            path = ".".join(parts[:number])
            if path not in sys.modules:
                monkeypatch.setitem(sys.modules, path, ModuleType(path))
        module = sys.modules[name]
        for use in uses:
            owner, _, method = use.__qualname__.rpartition(".")
            setattr(module, owner or method, globals()[owner or method])
            if owner:
                monkeypatch.setattr(globals()[owner], method, use)
    vars(sys.modules[f"{RUNTIME}.platforms.plugins"]).update(HookType=HookType, hooks=hooks)
    return hooks
