"""A model whose program calls us at each block and each attention: nothing is put on it.

Programs with hooks of their own (ComfyUI's block patches and attention override) run a model that
may be patched, quantised or half on the host. Their blocks are called, never read: the engine gets
what lies between the blocks and what goes into attention, as in the generic tier.

Letters in shapes: B batch, S tokens of a stream, H num_heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from flashomni.engine import Clock, Engine, Recipe
from flashomni.engine.call import Place
from flashomni.engine.layer import LayerRun
from flashomni.engine.runtime import Runtime
from flashomni.engine.schedules import StepKind
from flashomni.engine.sharding import Sharding
from flashomni.engine.trace import Summary
from flashomni.models.generic.attention import SDPA, Attention
from flashomni.models.generic.run import InBlock

Streams = tuple[Tensor, ...]


class Hosted:
    """One generation of a hosted model. :meth:`call` stands around the model, in it :meth:`block`
    around each block, in that :meth:`attend` in front of each attention.

    Args:
        model: the transformer, for its name and its report.
        layers: names of its blocks, in the order in which they run.
        recipe: what to compute and what to cache; see :func:`why_not`.
        backend: take exactly this backend in every op; by default the best that accepts.

    Raises:
        NotImplementedError: the recipe needs what a host does not tell.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[str], recipe: Recipe, backend: str | None = None
    ) -> None:
        reasons = why_not(recipe)
        if reasons:
            raise NotImplementedError(f"recipe {recipe.name!r}: {'; '.join(reasons)}")
        clock = Clock(model)
        runtime = Runtime(model, recipe, list(layers), clock, backend, lambda: None, "x")
        runtime.tier, runtime.sharding = "generic", Sharding(model, lambda: None, (), "x")
        runtime.sharding.start()
        self._runtime = runtime
        self._mode: _Asked | None = None
        self._engine = Engine(runtime, model, lambda: None)
        self.blocks_seen = 0

    def call(
        self,
        forward: Callable[[], Any],
        inputs: Mapping[str, Tensor],
        step: int,
        num_steps: int,
        branch: str,
    ) -> Any:
        """What ``forward()`` returns: one call of the model, or what is forecast instead.

        Args:
            forward: calls the model.
            inputs: the tensors that it gets, by name; ``x`` are the latents.
            step: from 0; it does not go back within a generation.
            num_steps: of the generation.
            branch: which conditioning; once a step.
        """
        runtime, tensors = self._runtime, dict(inputs)
        self._engine.step(step, num_steps, branch)
        runtime.begin(None, tensors["x"].device, (), tensors)
        try:
            output = runtime.forward((), tensors, lambda **_: forward())
            runtime.end(output)
        finally:
            runtime.abort()
        return output

    def block(
        self,
        index: int,
        streams: Streams,
        compute: Callable[[Streams], Streams],
        *,
        main: int = 0,
        text: Callable[[int], tuple[int, int]] = lambda seqlen: (0, 0),
        chain: bool = True,
    ) -> Streams:
        """The streams behind a block.

        Args:
            index: of the block among the layers.
            streams: ``[B, S, K]`` each, in front of it.
            compute: runs the block on such streams, which it may write to.
            main: which stream holds the vision tokens.
            text: where the text lies in an attention over so many tokens.
            chain: whether nobody but the next block reads what it returns.
        """
        self.blocks_seen += 1
        runtime = self._runtime
        if not runtime.running:
            return compute(streams)
        lengths = {sum(x.shape[1] for x in streams), streams[main].shape[1]}

        def run_with(run: LayerRun) -> Streams:
            # The engine compares what was in front of the block with what is behind it.
            compared = run.kind is not StepKind.DISPATCH or runtime.recipe.schedule.decides
            given = tuple(x.clone() for x in streams) if compared else streams
            self._mode = mode = _Asked(run, lengths, text)
            try:
                with mode:
                    behind = compute(given)
            finally:
                self._mode = None
            if not mode.has_begun:  # no attention of ours: cached whole, or not at all
                run.begin(max(lengths))
            return behind

        return runtime.block(index, Place(streams, main), run_with, chain)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """An attention of the block that runs, by the engine.

        Args:
            q: ``[B, H, S, D]``, like ``k`` and ``v``, after norm and RoPE.
            k: keys.
            v: values.
            mask: as ``attn_mask`` of ``scaled_dot_product_attention``.

        Returns:
            ``[B, H, S, D]``; ``None`` where the host is to compute it itself.
        """
        if self._mode is None:
            return None
        return self._mode.attend(Attention(q, k, v, mask, q.shape[-1] ** -0.5, None))

    def report(self) -> Summary:
        """What the generation computed, skipped, cost and kept."""
        return self._engine.report()

    def free(self) -> None:
        """Drop all caches; the report stays."""
        if self._runtime.last is not None:
            self._runtime.last.free()
        self._runtime.reset()


class _Asked(InBlock):
    """Runs the attention that the host offers, if it is the block's own and can run here."""

    def __init__(
        self, run: LayerRun, lengths: set[int], text: Callable[[int], tuple[int, int]]
    ) -> None:
        super().__init__(run, None, text)
        self._lengths = lengths

    def attend(self, call: Attention) -> Tensor | None:
        run = self._run
        if self.has_begun or call.q.ndim != 4 or call.q.shape[2] not in self._lengths:
            return None
        if call.why_not(run.backend) is not None or not run.can_attend(call.q.transpose(1, 2)):
            return None
        self._place = self._count
        return SDPA(call.q, call.k, call.v, attn_mask=call.mask, scale=call.scale)


def why_not(recipe: Recipe) -> list[str]:
    """What of a recipe does not run on a hosted model, in words."""
    found, schedule = [], recipe.schedule
    if schedule.modulates:
        found.append(
            f"schedule {schedule.name!r} looks inside the first block, whose inside nobody knows; "
            "take easycache or fbcache"
        )
    if recipe.guidance.acts:
        found.append("guidance leaves out calls of the model, which its program decides here")
    if recipe.sparse.token_order != "raster":
        found.append(f"token_order {recipe.sparse.token_order!r} needs to know every token's place")
    shaped = [policy.name for policy in recipe.policies if policy.wants_shape()]
    if shaped:
        found.append(f"policy {shaped[0]!r} needs frames, rows and columns, which are not told")
    return found
