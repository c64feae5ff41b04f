"""From ComfyUI's hooks to the engine: which step a call is, and what its blocks hand on.

ComfyUI tells a node three things that are used here, all by name, so that nothing of it is
imported: wrappers around a sampling and around a call of the model, a replacement of each block
(``patches_replace["dit"]``) and of each attention (``optimized_attention_override``). A call gets
the last two in options of its own: model, patcher and what other nodes put there stay untouched.
"""

from __future__ import annotations

import logging
from collections import Counter
from functools import partial
from typing import Any

from torch import Tensor, nn

from flashomni import Recipe
from flashomni.engine.trace import Summary
from flashomni.models.generic.hosted import Hosted, why_not

log = logging.getLogger("flashomni")
KEY = "flashomni"
OUTER_SAMPLE, DIFFUSION_MODEL = "outer_sample", "diffusion_model"
OVERRIDE = "optimized_attention_override"
MAX_BRANCHES = 8

# Lists of blocks in ComfyUI's models, in the order in which they run, and how patches name them.
LISTS = {
    "double_blocks": "double_block",
    "single_blocks": "single_block",
    "double_layers": "double_block",
    "single_layers": "single_block",
    "joint_blocks": "double_block",
    "transformer_blocks": "double_block",
    "blocks": "double_block",
}
# Where text and picture share an attention: of any other model no text is known.
TEXT = {
    "Flux": "first",
    "Chroma": "first",
    "QwenImageTransformer2DModel": "first",
    "MMDiT": "first",
    "OpenAISignatureMMDITWrapper": "first",
    "HunyuanVideo": "last",
}


class Accelerated:
    """What a model patcher and its clones share: a recipe, and the report of the last sampling.

    Args:
        recipe: what to compute and what to cache.
        backend: take exactly this backend in every op; by default the best that accepts.

    Attributes:
        report: of the last sampling with it that has ended.
    """

    def __init__(self, recipe: Recipe, backend: str | None = None) -> None:
        reasons = why_not(recipe)
        if reasons:
            raise ValueError(f"recipe {recipe.name!r} does not run in ComfyUI: {reasons[0]}")
        self.recipe, self.backend = recipe, backend
        self.report: Summary | None = None
        self._now: Sampling | None = None
        self._absent: dict[str, dict[int, set[str]]] = {}

    def __deepcopy__(self, memo: dict) -> Accelerated:
        return self  # clones of a patcher share it; a sampling has state of its own

    def put_on(self, patcher: Any) -> Any:
        """A clone of ``patcher`` with this on it, in place of what was put on it before."""
        model = patcher.model.diffusion_model
        found = blocks_of(model)
        if not found:
            name = type(model).__name__
            raise ValueError(
                f"model: {name} has no transformer blocks that ComfyUI lets a node replace (U-Nets "
                "such as SD 1.5 and SDXL have none); connect a diffusion transformer"
            )
        Hosted(model, list(found.values()), self.recipe, self.backend)  # what is wrong is said now
        clone = patcher.clone()
        take_off(clone)
        clone.add_wrapper_with_key(OUTER_SAMPLE, KEY, self.sample)
        clone.add_wrapper_with_key(DIFFUSION_MODEL, KEY, self.call)
        clone.set_attachments(KEY, self)
        return clone

    def sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around a sampling: caches live as long as it does, also where it is interrupted."""
        guider = executor.class_obj
        sigmas = kwargs["sigmas"] if "sigmas" in kwargs else args[3]
        model = guider.model_patcher.model.diffusion_model
        absent = self._absent.setdefault(type(model).__name__, {})
        outer, self._now = self._now, Sampling(model, sigmas, self.recipe, self.backend, absent)
        try:
            output = executor(*args, **kwargs)
            self.report = self._now.hosted.report()
            log.info("%s", self.report)
            return output
        finally:
            self._now.hosted.free()
            self._now = outer

    def call(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around a call of the model; outside of a sampling it is as it was."""
        if self._now is None:
            return executor(*args, **kwargs)
        return self._now.call(executor, args, kwargs)


def take_off(patcher: Any) -> None:
    """Take everything of ours off a patcher."""
    for kind in (OUTER_SAMPLE, DIFFUSION_MODEL):
        patcher.remove_wrappers_with_key(kind, KEY)
    patcher.remove_attachments(KEY)


def accelerated(patcher: Any) -> Accelerated | None:
    """What is on a patcher, or on the one that it is a clone of."""
    return patcher.get_attachment(KEY)


def blocks_of(model: nn.Module) -> dict[tuple[str, int], str]:
    """Names of a model's blocks by the keys that patches have, in the order of their running."""
    found: dict[tuple[str, int], str] = {}
    for name, kind in LISTS.items():
        blocks = getattr(model, name, None)
        if isinstance(blocks, nn.ModuleList) and (kind, 0) not in found:
            found |= {(kind, i): f"{name}.{i}" for i in range(len(blocks))}
    return found


class Sampling:
    """One run of a sampler.

    Args:
        model: the transformer.
        sigmas: noise levels of the run, its end included.
        recipe: what to compute and what to cache.
        backend: of every op; ``None`` for the best that accepts.
        absent: which of the streams that a block is given it does not return; added to. What a run
            finds out counts from the next one on: a block keeps its streams within a run.
    """

    def __init__(
        self,
        model: nn.Module,
        sigmas: Tensor,
        recipe: Recipe,
        backend: str | None,
        absent: dict[int, set[str]],
    ) -> None:
        self.keys = blocks_of(model)
        self.hosted = Hosted(model, list(self.keys.values()), recipe, backend)
        self._model, self._text_at = model, TEXT.get(type(model).__name__)
        self._steps = Steps(sigmas)
        self._told: set[str] = set()
        self._num_text = 0
        self._absent, self._left = absent, {i: frozenset(x) for i, x in absent.items()}

    def call(self, executor: Any, args: tuple, kwargs: dict) -> Any:
        options = next(filter(_is_options, (*args, *kwargs.values())), None)
        if options is None:
            self._tell("a call of the model says no step or conditioning: it runs dense")
            return executor(*args, **kwargs)
        replaced = options.get("patches_replace", {})
        foreign = [key for key in self.keys if key in replaced.get("dit", {})]
        if foreign or OVERRIDE in options:
            what = f"block {foreign[0]}" if foreign else "the attention"
            raise RuntimeError(
                f"FlashOmni Accelerate: another node replaces {what} of this model (a cache or a "
                "sparse attention of its own?); connect the model to one of the two only"
            )
        place = self._steps.place(options)
        if place is None:
            self._tell(f"more than {MAX_BRANCHES} conditionings a step: the rest run dense")
            return executor(*args, **kwargs)
        patches = {key: partial(self.block, i) for i, key in enumerate(self.keys)}
        ours = {
            **options,
            "patches_replace": {**replaced, "dit": {**replaced.get("dit", {}), **patches}},
            OVERRIDE: self.attention,
        }
        args = tuple(ours if x is options else x for x in args)
        kwargs = {name: ours if x is options else x for name, x in kwargs.items()}
        inputs = {f"input{i}": x for i, x in enumerate(args) if isinstance(x, Tensor)}
        inputs |= {name: x for name, x in kwargs.items() if isinstance(x, Tensor)}
        inputs["x"] = args[0] if args else kwargs["x"]
        inputs.pop("input0", None)
        seen = self.hosted.blocks_seen
        output = self.hosted.call(lambda: executor(*args, **kwargs), inputs, *place)
        if self.hosted.blocks_seen == seen and place[0] == 0:
            raise RuntimeError(
                f"FlashOmni Accelerate: {type(self._model).__name__} calls no block patches in "
                "this release of ComfyUI, so nothing of it can be cached; bypass the node"
            )
        return output

    def _tell(self, text: str) -> None:
        """Once a sampling."""
        if text not in self._told:
            log.warning("FlashOmni Accelerate: %s", text)
        self._told.add(text)

    def block(self, index: int, args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        """ComfyUI's replacement of a block."""
        names = [
            name
            for name in ("txt", "img")
            if isinstance(args.get(name), Tensor) and name not in self._left.get(index, ())
        ]
        joint = isinstance(args.get("txt"), Tensor)
        if joint:
            self._num_text = args["txt"].shape[1]
        output: dict[str, Any] = {}

        def compute(streams: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            given = dict(zip(names, streams, strict=True))
            output.update(extra["original_block"]({**args, **given}))
            return tuple(given[x] if output.get(x) is None else output[x] for x in names)

        behind = self.hosted.block(
            index,
            tuple(args[name] for name in names),
            compute,
            main=names.index("img"),
            text=partial(self._text, args["img"].shape[1], joint),
            chain="skip" not in args,
        )
        absent = self._absent.setdefault(index, set())
        if output:
            absent |= {name for name in names if output.get(name) is None}
        return {**output, **dict(zip(names, behind, strict=True)), **dict.fromkeys(absent)}

    def _text(self, num_main: int, joint: bool, seqlen: int) -> tuple[int, int]:
        count = self._num_text
        expected = num_main + count if joint else num_main  # behind double blocks, img holds both
        if self._text_at is None or seqlen != expected or not 0 < count < seqlen:
            return (0, 0)
        return (0, count) if self._text_at == "first" else (seqlen - count, seqlen)

    def attention(
        self, func: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any
    ) -> Tensor:
        """ComfyUI's replacement of an attention; what the engine does not take goes to ``func``."""
        mask = kwargs.get("mask", args[0] if args else None)
        split = not kwargs.get("skip_reshape", False)
        each = tuple(_by_head(x, heads) for x in (q, k, v)) if split else (q, k, v)
        o = self.hosted.attend(*each, mask)
        if o is None:
            return func(q, k, v, heads, *args, **kwargs)
        return o if kwargs.get("skip_output_reshape", False) else o.transpose(1, 2).flatten(2)


class Steps:
    """Which step a call is, told from its noise level; and which conditioning.

    Samplers of higher order call the model at levels between those of the schedule, or at one
    twice: then the second call of a step has caches of its own, like another conditioning.

    Args:
        sigmas: noise levels of the sampling, its end included.
    """

    def __init__(self, sigmas: Tensor) -> None:
        levels = [float(x) for x in sigmas.tolist()]
        self._sign = 1.0 if levels[0] >= levels[-1] else -1.0
        self._levels = [self._sign * x for x in levels]
        self.num_steps = max(len(levels) - 1, 1)
        self._names: dict[tuple, str] = {}
        self._known: set[str] = set()
        self._step, self._calls = -1, Counter[str]()

    def place(self, options: dict[str, Any]) -> tuple[int, int, str] | None:
        """``(step, num_steps, branch)``; ``None`` for a branch too many.

        It reads one number from the device, as ComfyUI's samplers do in each step.
        """
        level = self._sign * float(options["sigmas"].flatten()[0])
        near = 1e-4 * max(abs(level), 1e-6)
        step = min(max(sum(x > level + near for x in self._levels), 0), self.num_steps - 1)
        if step != self._step:
            self._step, self._calls = step, Counter()
        name = self._name(options)
        self._calls[name] += 1
        branch = name if self._calls[name] == 1 else f"{name} {self._calls[name]}"
        if branch not in self._known and len(self._known) >= MAX_BRANCHES:
            return None
        self._known.add(branch)
        return step, self.num_steps, branch

    def _name(self, options: dict[str, Any]) -> str:
        """Conditionings of one call, by what they are: they may be batched otherwise tomorrow."""
        kinds = options.get("cond_or_uncond") or [0]
        window = getattr(options.get("context_window"), "index_list", None)
        key = (*kinds, *options.get("uuids", ()), str(window))
        if key not in self._names:
            label = "+".join("uncond" if kind else "cond" for kind in kinds)
            alike = sum(name.split(" of ")[0] == label for name in self._names.values())
            self._names[key] = f"{label} of prompt {alike + 1}" if alike else label
        return self._names[key]


def _is_options(value: Any) -> bool:
    return isinstance(value, dict) and "sigmas" in value and "cond_or_uncond" in value


def _by_head(x: Tensor, heads: int) -> Tensor:
    """``[B, S, H * D]`` as ``[B, H, S, D]``."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
