"""HunyuanVideo's attention for training: no padding, so no mask, so the fastest kernels; and maps.

The stock processor hands over a mask for padded text, with which torch has no flash attention, and
rotates in many passes. Here every sample of a batch has the same number of text tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Watch = Callable[[Tensor, Tensor, int], None]


class Unpadded:
    """Attention processor of HunyuanVideo's blocks; exact where no token is padding.

    Attributes:
        backend: the kernel of torch's attention, or None for torch's own choice.
        watch: called with q and k ``[B, S, H, D]``, rotated, video tokens first, and the number of
            text tokens; or None.
    """

    def __init__(self, backend: SDPBackend | None = None, watch: Watch | None = None):
        self.backend, self.watch = backend, watch

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        text = encoder_hidden_states.shape[1]
        dual = attn.add_q_proj is not None
        if not dual:
            hidden_states = torch.cat([hidden_states, encoder_hidden_states], 1)
        q, k, v = (
            linear(hidden_states).unflatten(2, (attn.heads, -1))
            for linear in (attn.to_q, attn.to_k, attn.to_v)
        )
        q, k = _normed(q, attn.norm_q), _normed(k, attn.norm_k)
        if dual:
            tq, tk, tv = (
                linear(encoder_hidden_states).unflatten(2, (attn.heads, -1))
                for linear in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            )
            tq, tk = _normed(tq, attn.norm_added_q), _normed(tk, attn.norm_added_k)
            q, k, v = (torch.cat(pair, 1) for pair in ((q, tq), (k, tk), (v, tv)))
        turn = _turns(*image_rotary_emb, text)
        q, k = (_rotated(x, turn).to(v.dtype) for x in (q, k))
        if self.watch is not None:
            self.watch(q, k, text)
        out = attend(q, k, v, self.backend).flatten(2)
        video, words = out[:, :-text], out[:, -text:]
        if attn.to_out is not None:
            video = attn.to_out[1](attn.to_out[0](video))
        if attn.to_add_out is not None:
            words = attn.to_add_out(words)
        return video, words


def attend(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend | None) -> Tensor:
    """Dense attention of ``[B, S, H, D]`` tensors by one of torch's kernels."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def fastest(
    batch: int, seqlen: int, heads: int, dim: int
) -> tuple[SDPBackend | None, dict[str, float]]:
    """Torch's fastest kernel on this GPU, forward and backward; and milliseconds of each.

    A kernel that fails, or that disagrees with flash attention, is left out; None where all are.
    """
    tensors = [
        torch.randn(
            batch, seqlen, heads, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True
        )
        for _ in range(3)
    ]
    times: dict[str, float] = {}
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    wanted = None
    for name, backend in backends.items():
        try:
            for turn in range(4):
                if turn == 1:  # the first builds and warms up
                    torch.cuda.synchronize()
                    begin = time.perf_counter()
                out = attend(*tensors, backend)
                grads = torch.autograd.grad(out, tensors, tensors[2].detach())
            torch.cuda.synchronize()
        except RuntimeError:
            continue
        found = (out.detach(), *grads)
        if wanted is None:
            wanted = found
        gaps = [(a - b).abs().max().item() for a, b in zip(found, wanted, strict=True)]
        # both round the same sums in another order; a wrong kernel is off by their size
        if all(gap <= 0.1 * b.abs().max().item() for gap, b in zip(gaps, wanted, strict=True)):
            times[name] = (time.perf_counter() - begin) / 3 * 1e3
    return (backends[min(times, key=times.__getitem__)] if times else None), times


def _normed(x: Tensor, norm: nn.Module) -> Tensor:
    return F.rms_norm(x.float(), x.shape[-1:], norm.weight.float(), norm.eps)


def _turns(cos: Tensor, sin: Tensor, text: int) -> Tensor:
    """Rotations as complex numbers [S, 1, D / 2]; text is not turned."""
    turn = torch.complex(cos[:, ::2].float(), sin[:, ::2].float())
    return torch.cat([turn, turn.new_ones(text, turn.shape[1])])[:, None]


def _rotated(x: Tensor, turn: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2)


def install(transformer: nn.Module, processor: Unpadded) -> Unpadded:
    """Put one processor on all blocks (not on the text refiner); returns it."""
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.attn.set_processor(processor)
    return processor


def token_order(grid: tuple[int, int, int], tile: int, device=None) -> Tensor:
    """Indices of the tokens of ``grid`` (frames, rows, columns), tile by tile over all frames.

    A tile has ``tile`` x ``tile`` tokens in every frame; 0 keeps the raster order.
    """
    index = torch.arange(grid[0] * grid[1] * grid[2], device=device)
    if not tile:
        return index
    column, row = index % grid[2], index // grid[2] % grid[1]
    wide = -(-grid[2] // tile)
    return ((row // tile) * wide + column // tile).argsort(stable=True)


@torch.no_grad()
def block_mass(q: Tensor, k: Tensor, block: int = 128, rows: int = 48) -> Tensor:
    """Attention mass of blocks of keys: fp32 ``[H, R, N]``, each row summing to one.

    Args:
        q, k: ``[S, H, D]``, of one sample; the last of the N blocks may be short.
        block: tokens of a block.
        rows: at most so many blocks of queries, spread evenly over all, are looked at.
    """
    seqlen, heads, dim = q.shape
    count = -(-seqlen // block)
    picks = torch.linspace(0, count - 1, min(rows, count)).round().long().tolist()
    out = torch.empty(heads, len(picks), count, device=q.device)
    keys = k.float().permute(1, 2, 0)
    for i, pick in enumerate(picks):
        queries = q[pick * block : (pick + 1) * block].float().transpose(0, 1)
        weight = (queries @ keys * dim**-0.5).softmax(-1).mean(1)
        out[:, i] = F.pad(weight, (0, count * block - seqlen)).unflatten(1, (count, block)).sum(-1)
    return out


def top_share(mass: Tensor, part: float = 0.25) -> float:
    """Mass in the largest ``part`` of each row's blocks, of mass ``[H, R, N]``; mean over rows."""
    count = max(1, round(part * mass.shape[-1]))
    return mass.topk(count).values.sum(-1).mean().item()
