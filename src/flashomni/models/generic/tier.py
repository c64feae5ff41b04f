"""A model without an adapter: learned from its first call, then cached like any other."""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Hashable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flashomni.engine.call import Place
from flashomni.engine.layer import LayerRun
from flashomni.engine.runtime import Runtime
from flashomni.models import Adapter, Site
from flashomni.models._chosen_attention import kept_backend, process_backend
from flashomni.models._offload import Once, rise
from flashomni.models._stand_in import InsteadOfForward
from flashomni.models.generic.blocks import Blocks, declared, find_blocks
from flashomni.models.generic.pattern import Learned, learn, leave_out_short, mismatch
from flashomni.models.generic.run import Guide, InBlock, run_block
from flashomni.models.generic.watch import Watch, named_arguments

log = logging.getLogger("flashomni")
X = Adapter.latents


class Generic(Adapter):
    """Learns a model, and runs its blocks: the adapter of one model.

    Each sort of call (which arguments it gets, and of which kinds) is watched once: that call
    computes everything and keeps nothing.

    Args:
        model: the transformer.
        blocks: what is said of its blocks; by default what is declared about its class.
        why: what keeps its adapter from running it, for the report.

    Raises:
        ValueError: there is no list of blocks.
    """

    def __init__(self, model: nn.Module, blocks: Blocks | None = None, why: str = "") -> None:
        known = declared()
        name = type(model).__name__
        self.said = known.get(name, Blocks()) if blocks is None else blocks
        self.tier = "generic" if blocks is None and name not in known else "declared"
        self.model, self._why = model, why
        self.lists: list[str] = []  # of each block
        self.blocks: list[tuple[str, nn.Module]] = []
        for path, members in find_blocks(model, self.said).items():
            self.lists += [path] * len(members)
            self.blocks += members
        if not self.blocks:
            raise ValueError(f"{name} has no ModuleList of blocks that hold an attention")
        self._names = _positional(model)
        self.transformer = name  # type: ignore[misc]
        if X not in self._names:
            self.latents = self._names[0]  # type: ignore[misc]
        self._known: dict[Hashable, Learned] = {}
        self._index: dict[int, int] = {}  # number of a block -> its place among the layers
        self._kept: set[int] = set()  # blocks whose attention is the user's choice
        self._sort: Hashable = None
        self._watch: Watch | None = None
        self._inputs: dict[str, Any] = {}
        self._guide: Guide | None = None
        self._runtime: Runtime | None = None

    def sites(self, model: nn.Module) -> list[Site]:
        """The blocks, for who asks what hooks they carry."""
        return [Site(path, block, _nothing, ()) for path, block in self.blocks]

    def check(self, model: nn.Module) -> None:
        """Whether the model can be accelerated; and whose attention its blocks have by now.

        Raises:
            NotImplementedError: its attention is spread over devices.
        """
        for name, module in model.named_modules():
            processor = getattr(module, "processor", None)
            if getattr(processor, "_parallel_config", None) is not None:
                raise NotImplementedError(
                    f"{name}: context parallelism is not supported; call accelerate without it"
                )
        blocks = (block for _, block in self.blocks)
        self._kept = {number for number, block in enumerate(blocks) if kept_backend(block)}

    def stand_ins(self, runtime: Runtime) -> Iterator[InsteadOfForward]:
        """Put what is needed on the model, one by one."""
        self._runtime = runtime
        runtime.learner, runtime.tier = self, self.tier
        for number in range(len(self.blocks)):
            yield LearnedForward(self, runtime, number)
        yield WatchedForward(self, runtime)

    # What the runtime asks.

    def begin(self, args: tuple, kwargs: dict) -> tuple[Hashable, bool]:
        """A call of the model starts: what sort it is, and whether it is the first of it."""
        self._inputs = named_arguments(self._names, args, kwargs)
        given = tuple(sorted((name, _sort(v)) for name, v in self._inputs.items()))
        self._sort = (process_backend(), *given)  # it decides whose attention can be ours
        runtime = self._runtime
        assert runtime is not None
        at_output = runtime.recipe.at_output  # which needs no streams
        is_new = self._sort not in self._known and not at_output
        self._watch = Watch(runtime.backend) if is_new else None
        self._guide = Guide(runtime.recipe)
        return self._sort, is_new

    def forget(self) -> None:
        """Learn again: another recipe needs other things of the blocks."""
        assert self._runtime is not None
        self._known.clear()
        self._index.clear()
        self._runtime.arrange([path for path, _ in self.blocks])

    def notes(self) -> list[str]:
        """What is not cached and why, and whose attention runs."""
        notes: dict[str, None] = {}
        if self._why:
            notes[f"without the adapter of its class, which does not run {self._why}"] = None
        for learned in self._known.values():
            for path, reason in learned.refused.items():
                notes[f"{path}: computed in every step, because {reason}"] = None
        learned = self._known.get(self._sort) or next(iter(self._known.values()), Learned())
        counts = Counter(self.lists)
        for path, count in counts.items():
            numbers = [n for n in learned.order if self.lists[n] == path and n in learned.sites]
            ours = sum(number in learned.attention for number in numbers)
            why = Counter(learned.own[n] for n in numbers if n in learned.own)
            if ours:
                notes[f"{path}: attention of {ours} of {count} blocks on FlashOmni's op"] = None
            for reason, times in why.items():
                notes[f"{path}: the model's own attention in {times} blocks: {reason}"] = None
        backend = kept_backend(self.model)
        if backend is not None:
            notes[f"attention backend {backend!r} is the user's: kept"] = None
        return list(notes)

    # What the stand-ins ask.

    def watched(self, forward: Any, args: tuple, kwargs: dict) -> Any:
        """Run the model and learn from it, if it is the first call of its sort."""
        watch, self._watch = self._watch, None
        if watch is None:
            return forward(*args, **kwargs)
        self._watch = watch
        try:
            with watch:
                output = forward(*args, **kwargs)
        finally:
            self._watch = None
        self._learn(watch, output)
        return output

    def _learn(self, watch: Watch, output: Any) -> None:
        runtime = self._runtime
        assert runtime is not None
        seen = watch.finish(output)
        learned = learn(seen, self.blocks, self.lists, self.said.chain)
        if runtime.recipe.schedule.decides:
            leave_out_short(learned, seen, self.lists)
        self._known[self._sort] = learned
        if not self._index and learned.sites:  # the layers, as they ran
            numbers = [number for number in learned.order if number in learned.sites]
            self._index = {number: index for index, number in enumerate(numbers)}
            runtime.arrange([self.blocks[number][0] for number in numbers])
        for path, reason in learned.refused.items():
            log.warning("%s: computed in every step, because %s", path, reason)

    def run(self, number: int, forward: Any, names: list[str], args: tuple, kwargs: dict) -> Any:
        """Run a block within a call of the model."""
        runtime = self._runtime
        assert runtime is not None
        if self._watch is not None:
            named = named_arguments(names, args, kwargs)
            record = runtime.as_it_is(self.blocks[number][0])
            return self._watch.block(number, forward, named, args, kwargs, record.add)
        if runtime.recipe.at_output:
            return self._run_whole(number, forward, args, kwargs)
        learned = self._known[self._sort]
        site = learned.sites.get(number)
        if site is None or number not in self._index:
            with InBlock(runtime.as_it_is(self.blocks[number][0])):
                return forward(*args, **kwargs)
        named = named_arguments(names, args, kwargs)
        streams = tuple(named[name] for name in site.streams)
        refused: list[Any] = []

        def compute(run: LayerRun) -> tuple[Tensor, ...]:
            versions = [_version(x) for x in streams]
            ours = None if number in self._kept else learned.attention.get(number)
            text = partial(self._text, named)
            output = run_block(run, forward, args, kwargs, streams, ours, text, self._guide)
            reason = mismatch(site, named, output)
            if versions != [_version(x) for x in streams]:
                reason = "it writes into its arguments"
            if reason is not None:
                self._refuse(learned, number, reason)
                refused.append(output)
                return streams
            return site.unpack(output)

        place = Place(streams, _main(site, streams))
        behind = runtime.block(self._index[number], place, compute, site.chain)
        return refused[0] if refused else site.pack(behind)

    def _run_whole(self, number: int, forward: Any, args: tuple, kwargs: dict) -> Any:
        """A block of a model whose output is cached: only its FLOPs are of interest."""
        runtime = self._runtime
        assert runtime is not None
        result: list[Any] = []

        def compute(run: LayerRun) -> tuple[Tensor, ...]:
            result.append(run_block(run, forward, args, kwargs, (), None, lambda n: (0, 0)))
            return ()

        runtime.block(number, Place(()), compute)
        return result[0]

    def _refuse(self, learned: Learned, number: int, reason: str) -> None:
        """From here on the list of a block is computed in every step."""
        path = self.lists[number]
        learned.refused[path] = f"{self.blocks[number][0]}: {reason}"
        for other in [n for n in learned.sites if self.lists[n] == path]:
            del learned.sites[other]
        log.warning("%s: computed in every step, because %s", path, learned.refused[path])

    def _text(self, named: dict[str, Any], seqlen: int) -> tuple[int, int]:
        """The token range of the text in a sequence of ``seqlen`` tokens, if it is known."""
        if self.said.text is None:
            return (0, 0)
        source = named.get(self.said.text_from, self._inputs.get(self.said.text_from))
        count = source.shape[-2] if isinstance(source, Tensor) and source.ndim > 1 else 0
        if not 0 < count < seqlen:
            return (0, 0)
        return (0, count) if self.said.text == "first" else (seqlen - count, seqlen)


class LearnedForward(InsteadOfForward):
    """Runs a block as its model was learned."""

    def __init__(self, generic: Generic, runtime: Runtime, number: int) -> None:
        block = generic.blocks[number][1]
        super().__init__(block)
        self._generic, self.runtime, self._number = generic, runtime, number
        self._names = _positional(block)

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active or not self.runtime.running:  # the block is called by itself
            return self.original(*args, **kwargs)
        forward = Once(self.module, self.original)
        output = self._generic.run(self._number, forward, self._names, args, kwargs)
        forward.settle()
        return output

    def rise(self) -> None:
        rise(self)


class WatchedForward(InsteadOfForward):
    """Watches the first call of each sort."""

    def __init__(self, generic: Generic, runtime: Runtime) -> None:
        super().__init__(generic.model)
        self._generic, self.runtime = generic, runtime

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active or not self.runtime.running:
            return self.original(*args, **kwargs)
        return self._generic.watched(self.original, args, kwargs)


def _positional(module: nn.Module) -> list[str]:
    """Names of the parameters of a module's forward that may be given by position."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return [each.name for each in parameters if each.kind in kinds]


def _sort(value: Any) -> str:
    """What tells two sorts of calls apart in one argument."""
    if isinstance(value, Tensor):
        return f"tensor {value.ndim}"
    if isinstance(value, (bool, str, type(None))):
        return repr(value)
    if isinstance(value, dict):
        return str(sorted((str(key), _sort(part)) for key, part in value.items()))
    if isinstance(value, (tuple, list)):
        return f"{len(value)} of {sorted({_sort(part) for part in value})}"
    return type(value).__name__


def _main(site: Site, streams: tuple[Tensor, ...]) -> int:
    """Which stream holds the vision tokens."""
    if X in site.streams:
        return site.streams.index(X)
    return max(range(len(streams)), key=lambda i: streams[i].shape[:-1].numel())


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version


def _nothing(*_: object) -> None:
    """These blocks run by their own forward."""
