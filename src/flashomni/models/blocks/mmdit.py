"""A declarative MMDiT: what its blocks are called and how they lay out text and vision.

Most models of this kind are FLUX's two blocks in another arrangement. A dual block has projections,
norms and MLPs for each of two streams and one attention over both; a single block runs one
sequence, and fuses the output projections of attention and MLP into one ``proj_out`` over both.

Letters in shapes: B batch, S tokens of the whole sequence, R tokens of one stream, K features.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from flashomni.engine import LayerRun
from flashomni.engine.linear import join_tokens
from flashomni.kernels.common.rope import Rope, pack_rope
from flashomni.kernels.elementwise.op import gated_residual
from flashomni.models import Adapter, Reliance, Site
from flashomni.models._relies import BLOCK, rely_on_attention
from flashomni.models.blocks.fused import adaptive_norm, residual_norm
from flashomni.models.blocks.joint import (
    Later,
    Stream,
    added_stream,
    dual_attention,
    feed_forward,
    gelu_up,
    joint_attention,
    own_stream,
    valid_first,
)
from flashomni.models.blocks.positions import rope_in_order

VISION, TEXT = "hidden_states", "encoder_hidden_states"  # the streams, as diffusers names them
Span = tuple[int, int]


@dataclass(frozen=True)
class Inputs:
    """What a block was called with.

    Args:
        x: vision tokens ``[B, R, K]``.
        c: text tokens ``[B, R', K]``.
        rest: the other arguments by name.
    """

    x: Tensor
    c: Tensor
    rest: dict[str, Any]


@dataclass(frozen=True)
class MMDiT:
    """The blocks of one model.

    A model whose blocks compute something else inside overrides :meth:`dual` or :meth:`up`.

    Args:
        dual_class: class of the blocks in ``transformer_blocks``.
        single_class: class of those in ``single_transformer_blocks``; ``None`` if there are none.
        attention: classes of their attention and of its processor.
        single_attention: likewise in the single blocks, where they are others.
        joined: whether a single block gets text and vision as one sequence, and returns that alone.
        text: whether the text comes ``first`` or ``last`` in the sequence.
        returns: the streams in the order in which a block returns them.
        rope: the block's arguments that may hold RoPE tables, ``(cos, sin)`` ``[S, D]``.
        rope_on_text: whether they cover the text too, or vision only.
        mask: the block's argument that masks padding of the text, if it has one: ``[B, ..., N]``,
            of the N tokens of the sequence, or of the text, which is last then.
        unsorted: whether the padding may be anywhere in the text; else it is at the end.
        refused: the block's argument of extra attention inputs, which must be empty.
        by_token: see :class:`Site`.
        clip: whether the stock blocks clip what would overflow fp16: the dual ones their text, the
            single ones both.
    """

    dual_class: str
    attention: tuple[str, str]
    single_class: str | None = None
    single_attention: tuple[str, str] | None = None
    joined: bool = False
    text: str = "first"
    returns: tuple[str, str] = (TEXT, VISION)
    rope: tuple[str, ...] = ("image_rotary_emb",)
    rope_on_text: bool = True
    mask: str = ""
    unsorted: bool = False
    refused: str = "joint_attention_kwargs"
    by_token: Mapping[str, int] = field(default_factory=dict)
    clip: bool = False

    def sites(self, model: Any) -> list[Site]:
        """The blocks of a model, in the order in which they run."""
        groups: list[tuple[str, Any, Any]] = [("transformer_blocks", self.dual, self.modulated)]
        if self.single_class is not None:
            groups.append(("single_transformer_blocks", self.single, None))
        found = []
        for group, run, modulated in groups:
            for i, block in enumerate(getattr(model, group)):
                named = _Named(run, block)
                probe = None if modulated is None else partial(named.apply, modulated)
                name = f"{group}.{i}"
                if self.joined and group.startswith("single"):
                    site = Site(name, block, named, (VISION,), VISION)
                else:
                    site = Site(name, block, named, self.returns, modulated=probe)
                found.append(replace(site, by_token=self.by_token, sequence=self.sequence))
        return found

    @property
    def sequence(self) -> tuple[str, str]:
        """The streams as they follow one another."""
        return (TEXT, VISION) if self.text == "first" else (VISION, TEXT)

    def relies_on(self, model: Any) -> list[Reliance]:
        """Blocks and attention modules, which are never called; what is in them mostly is."""
        groups = [("transformer_blocks", self.dual_class, self.attention)]
        if self.single_class is not None:
            single = self.single_attention or self.attention
            groups.append(("single_transformer_blocks", self.single_class, single))
        found = []
        for group, block_class, (attention, processor) in groups:
            for i, block in enumerate(getattr(model, group)):
                name = f"{group}.{i}"
                found += rely_on_attention(f"{name}.attn", block.attn, (attention,), processor)
                found.append(Reliance(name, block, (block_class,), BLOCK))
        return found

    def refuse_extra(self, inputs: Inputs) -> None:
        """Raise ``NotImplementedError`` where there are extra attention inputs."""
        extra = inputs.rest.get(self.refused)
        if extra:
            raise NotImplementedError(
                f"{self.refused} {sorted(extra)} are not supported by an accelerated model; leave "
                "them out, or call engine.remove()"
            )

    def begin(self, run: LayerRun, inputs: Inputs) -> tuple[Span, Span]:
        """Tell the run its sequence; return the spans of vision and text.

        Raises:
            NotImplementedError: there are extra attention inputs, which would be lost.
        """
        self.refuse_extra(inputs)
        num_vision, num_text = inputs.x.shape[1], inputs.c.shape[1]
        seqlen, first = num_vision + num_text, self.text == "first"
        text = (0, num_text) if first else (num_vision, seqlen)
        vision = (num_text, seqlen) if first else (0, num_vision)
        place = {} if run.geometry is None else run.geometry.place(vision[0], num_vision)
        run.begin(seqlen, text=text, kv_len=self.kv_len(run, inputs), **place)
        return vision, text

    def kv_len(self, run: LayerRun, inputs: Inputs) -> Tensor | None:
        """Valid keys of each batch item, int32 ``[B]``, where a mask is given.

        The models build their blocks' masks themselves, of a count: valid keys come first.
        """
        mask = inputs.rest.get(self.mask)
        seqlen = run.total(inputs.x.shape[1] + inputs.c.shape[1])
        return None if mask is None else run.shared(_count_valid, mask, seqlen)

    def order(self, run: LayerRun, inputs: Inputs) -> tuple[Tensor, int] | None:
        """Keys of the text with valid ones first, see :class:`Stream`, where they may not be so."""
        mask = inputs.rest.get(self.mask) if self.unsorted else None
        if mask is None:
            return None
        order = run.shared(_valid_text, mask, run.whole(TEXT, inputs.c))
        return order, run.start_of(TEXT, inputs.x.shape[1])  # last

    def ropes(
        self, run: LayerRun, inputs: Inputs, vision: Span, text: Span
    ) -> tuple[Rope | None, Rope | None]:
        """Packed RoPE tables of vision and text."""
        tables = self._tables(run, inputs, vision)
        if tables is None or not self.rope_on_text:
            return tables, None
        return _rows(tables, vision), _rows(tables, text)

    def _tables(self, run: LayerRun, inputs: Inputs, vision: Span) -> Rope | None:
        given = (inputs.rest.get(name) for name in self.rope)
        tables = next((each for each in given if each is not None), None)
        if tables is None:
            return None
        packed = run.shared(pack_rope, *tables)
        if not self.rope_on_text:
            return rope_in_order(run, packed, stream=VISION)
        expected = run.total(run.rows)
        if packed[0].ndim == 2 and packed[0].shape[0] != expected:
            raise ValueError(
                f"RoPE covers {packed[0].shape[0]} tokens, and the block has {expected}: pass "
                "position ids (img_ids, txt_ids) of the same tokens, where ranks share them with "
                "the dimensions that diffusers splits"
            )
        return rope_in_order(run, packed, run.start_of(VISION, vision[0]))

    def dual(self, run: LayerRun, block: Any, inputs: Inputs) -> tuple[Tensor, ...]:
        """A block with two streams."""
        x, c, temb = inputs.x, inputs.c, inputs.rest["temb"]
        vision, text = self.begin(run, inputs)
        norm_x, gate, shift_mlp, scale_mlp, gate_mlp = adaptive_norm(
            block.norm1, x, temb, backend=run.backend
        )
        norm_c, c_gate, c_shift, c_scale, c_gate_mlp = adaptive_norm(
            block.norm1_context, c, temb, backend=run.backend
        )
        rope, c_rope = self.ropes(run, inputs, vision, text)
        y, c_y = dual_attention(
            run,
            block.attn,
            own_stream(block.attn, norm_x, vision, rope),
            added_stream(block.attn, norm_c, text, c_rope, self.order(run, inputs)),
        )
        x, norm_x = residual_norm(
            x, y, gate, block.norm2, scale_mlp, shift_mlp, backend=run.backend
        )
        del y
        x = gated_residual(x, feed_forward(run, block.ff, norm_x), gate_mlp, backend=run.backend)
        c, norm_c = residual_norm(
            c, c_y, c_gate, block.norm2_context, c_scale, c_shift, backend=run.backend
        )
        c = gated_residual(
            c, feed_forward(run, block.ff_context, norm_c), c_gate_mlp, backend=run.backend
        )
        return self.output(x, self._clipped(c))

    def modulated(self, block: Any, inputs: Inputs, backend: str | None) -> Tensor:
        """Vision tokens of a dual block after its first norm and modulation."""
        return adaptive_norm(block.norm1, inputs.x, inputs.rest["temb"], backend=backend)[0]

    def single(self, run: LayerRun, block: Any, inputs: Inputs) -> tuple[Tensor, ...]:
        """A block with one sequence, split again at the end."""
        vision, text = self.begin(run, inputs)
        x, c = inputs.x, inputs.c
        x = join_tokens(c, x) if self.text == "first" else join_tokens(x, c)
        norm_x, gate = adaptive_norm(block.norm, x, inputs.rest["temb"], backend=run.backend)
        streams = self._single_streams(run, block.attn, norm_x, inputs, vision, text)
        up = Later(partial(self.up, run, block, norm_x))
        o = joint_attention(run, block.attn, streams, block.proj_out, meanwhile=up)
        del norm_x, streams  # beside the MLP there is no room to spare
        y = run.project_o(o, block.proj_out, row_offset=0, always=up.take())
        del o
        x = self._clipped(gated_residual(x, y, gate, backend=run.backend))
        return self.output(x[:, slice(*vision)], x[:, slice(*text)])

    def up(self, run: LayerRun, block: Any, x: Tensor) -> Tensor:
        """The first half of a single block's MLP, ``[B, S, E]``, counted."""
        return gelu_up(run, block, x)

    def _single_streams(
        self, run: LayerRun, attn: Any, x: Tensor, inputs: Inputs, vision: Span, text: Span
    ) -> list[Stream]:
        """One stream of the whole sequence where RoPE treats all tokens alike, otherwise two."""
        tables = self._tables(run, inputs, vision)
        if tables is None or self.rope_on_text:
            return [own_stream(attn, x, (0, x.shape[1]), tables)]
        return [
            own_stream(attn, x[:, slice(*vision)], vision, tables),
            own_stream(attn, x[:, slice(*text)], text, None, self.order(run, inputs)),
        ]

    def output(self, x: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        """The streams as a block returns them."""
        return (x, c) if self.returns[0] == VISION else (c, x)

    def _clipped(self, x: Tensor) -> Tensor:
        return x.clip(-65504, 65504) if self.clip and x.dtype == torch.float16 else x


class MMDiTAdapter(Adapter):
    """An adapter of a model that is nothing but such blocks.

    Attributes:
        blocks: of the model.
    """

    blocks: ClassVar[MMDiT]

    def sites(self, model: Any) -> list[Site]:
        return self.blocks.sites(model)

    def relies_on(self, model: Any) -> list[Reliance]:
        return self.blocks.relies_on(model)


class _Named:
    """``run(run, block, *args, **kwargs)`` of a site, with the names of the block's own parameters.

    Args:
        compute: gets the run, the block and its :class:`Inputs`.
        block: whose forward names the arguments.
    """

    def __init__(self, compute: Callable[..., tuple[Tensor, ...]], block: Any) -> None:
        self._compute = compute
        own = list(inspect.signature(type(block).forward).parameters.values())[1:]
        self._names = [parameter.name for parameter in own]
        first = [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in ("run", "block")
        ]
        positional = [each for each in own if each.kind is each.POSITIONAL_OR_KEYWORD]
        self.__signature__ = inspect.Signature(first + positional)

    def __call__(self, run: LayerRun, block: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return self._compute(run, block, self._inputs(args, kwargs))

    def apply(
        self,
        probe: Callable[..., Tensor],
        block: Any,
        *args: Any,
        backend: str | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """``probe(block, inputs, backend)`` of the same arguments."""
        return probe(block, self._inputs(args, kwargs), backend)

    def _inputs(self, args: tuple, kwargs: dict[str, Any]) -> Inputs:
        rest = {**dict(zip(self._names, args, strict=False)), **kwargs}
        return Inputs(rest.pop(VISION), rest.pop(TEXT), rest)


def _count_valid(mask: Tensor, seqlen: int) -> Tensor:
    """Valid keys of each batch item in a sequence whose other tokens all are: int32 ``[B]``."""
    mask = mask.flatten(1)
    return seqlen - mask.shape[1] + (mask != 0).sum(-1, dtype=torch.int32)


def _valid_text(mask: Tensor, num_text: int) -> Tensor:
    return valid_first(mask.flatten(1)[:, -num_text:])


def _rows(rope: Rope, span: Span) -> Rope:
    """Rows of the RoPE tables."""
    return rope[0][slice(*span)], rope[1][slice(*span)]
