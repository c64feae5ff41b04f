"""Block-sparse attention on the CPU: gathers the visited key blocks and multiplies only those.

Query blocks that visit the same number of key blocks are batched, so that every core works on a
query block of its own; buffers are reused, because fresh pages cost as much as the arithmetic.
Where nothing is skipped torch's fused attention runs: for single rows, and for whole calls.
Summaries of skipped blocks are an attention of their own, merged by its LSE.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from flashomni.dispatch import not_on, register
from flashomni.kernels.attention.op import AttentionCall, summary_bias, write_forecast_rows
from flashomni.kernels.summarise.op import Summary
from flashomni.symbols import Grid, Symbols

SCORE_BLOCKS = 32  # key blocks that a core takes at once


def _refuses(call: AttentionCall) -> list[str]:
    return not_on("cpu", call.q)


@register("attention", "cpu", rank=10, refuses=_refuses, device="cpu")
def run(call: AttentionCall) -> None:
    write_forecast_rows(call)
    batch, seqlen_q, num_heads, _ = call.q.shape
    seqlen_kv = call.k.shape[1]
    symbols = call.symbols or Symbols.dense(Grid(seqlen_q, seqlen_kv), batch, num_heads)
    q_mask, kv_mask = symbols.q_mask(), symbols.kv_mask()
    is_dense = call.symbols is None or bool(q_mask.all() and kv_mask.all())
    kv_lens = [seqlen_kv] * batch if call.kv_len is None else call.kv_len.tolist()
    for b, kv_len in enumerate(kv_lens):
        kv_len = min(max(kv_len, 0), seqlen_kv)
        if is_dense and call.lse is None and kv_len > 0:
            _dense(call, b, kv_len)
        else:
            _sparse(call, b, kv_len, q_mask[b], kv_mask[b], symbols.grid)


def _dense(call: AttentionCall, b: int, kv_len: int) -> None:
    q, k, v = (x[b : b + 1].transpose(1, 2) for x in (call.q, call.k, call.v))
    o = torch.nn.functional.scaled_dot_product_attention(
        q,
        k[:, :, :kv_len],
        v[:, :, :kv_len],
        scale=call.softmax_scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    call.out[b] = o[0].transpose(0, 1)


def _sparse(
    call: AttentionCall, b: int, kv_len: int, q_mask: Tensor, kv_mask: Tensor, grid: Grid
) -> None:
    """One batch item: q_mask ``[H, Mb]``, kv_mask ``[H, Mb, Nb]``."""
    block_m, block_n = grid.block_m, grid.block_n
    kv_mask = kv_mask[..., : -(-kv_len // block_n)]
    q = _to_blocks(call.q[b], block_m)  # [H, Mb, block_m, D]
    k, v = (_to_blocks(x[b, :kv_len], block_n) for x in (call.k, call.v))  # [Hkv, Nb, block_n, D]
    tail = grid.seqlen_q % block_m
    has_summary = call.summary is not None
    is_copied = tail > 0 or has_summary
    o = q.new_empty(q.shape).transpose(0, 1)  # [Mb, H, block_m, D]
    if not is_copied:
        o = call.out[b].unflatten(0, (-1, block_m)).transpose(1, 2)  # a view: rows go straight in
    lse = q.new_empty(q.shape[:3]) if has_summary or call.lse is not None else None

    full = kv_mask.all(-1) & (kv_len > 0 and lse is None)
    for h, rows in enumerate(q_mask & full):
        if rows.any():
            key, value = (x[h // (len(q_mask) // len(x))].flatten(0, 1)[:kv_len] for x in (k, v))
            o[rows, h] = _fused(q[h, rows], key, value, call.softmax_scale).to(o.dtype)
    _partial(q, k, v, o, lse, q_mask & ~full, kv_mask, kv_len % block_n, call.softmax_scale)
    if lse is not None and has_summary:
        _add_summaries(call, b, q, o, lse, q_mask)

    rows = q_mask.repeat_interleave(block_m, -1)[:, : grid.seqlen_q]  # [H, M]
    if is_copied:
        new = o.transpose(1, 2).flatten(0, 1)[: grid.seqlen_q].to(call.out.dtype)
        call.out[b] = torch.where(rows.T[..., None], new, call.out[b])
    if call.lse is not None and lse is not None:
        call.lse[b] = torch.where(rows, lse.flatten(1)[:, : rows.shape[1]], call.lse[b])


def _fused(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
    """Query blocks ``[n, block_m, D]`` of one head over all keys ``[N, D]``."""
    tokens = q.flatten(0, 1)[None, None]
    o = torch.nn.functional.scaled_dot_product_attention(
        tokens, k[None, None], v[None, None], scale=softmax_scale
    )
    return o.view_as(q)


def _partial(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor | None,
    q_mask: Tensor,
    kv_mask: Tensor,
    tail: int,
    softmax_scale: float,
) -> None:
    """Fill o ``[Mb, H, block_m, D]`` where q_mask ``[H, Mb]``, visiting kv_mask ``[H, Mb, Nb]``.

    A *row* is a pair (head, query block), numbered head by head. ``tail`` is the number of keys in
    the last key block, 0 if it is full.
    """
    num_heads, num_q_blocks, block_m, head_dim = q.shape
    num_kv_heads, num_kv_blocks, block_n, _ = k.shape
    k, v = (x.flatten(0, 1).flatten(1) for x in (k, v))  # [Hkv * Nb, block_n * D]
    counts = kv_mask.sum(-1)
    visited = torch.argsort(~kv_mask, dim=-1, stable=True)  # visited blocks first, ascending
    key_head = torch.arange(num_heads) // (num_heads // num_kv_heads)
    visited = (visited + key_head[:, None, None] * num_kv_blocks).flatten(0, 1)
    # Blocks ascend, so a partly filled last block is the last one visited.
    ragged = kv_mask[..., -1] if tail and num_kv_blocks else torch.zeros_like(q_mask)
    kind = (2 * counts + ragged).masked_fill(~q_mask, -1).flatten()

    # Rows in the order of their kind, so that a batch of them is a slice.
    kind, rows = kind.sort(stable=True)
    skip = int((kind < 0).sum())
    kind, rows = kind[skip:], rows[skip:]
    h, i = rows // num_q_blocks, rows % num_q_blocks
    in_order = len(rows) == len(q_mask.flatten()) and bool((rows[1:] > rows[:-1]).all())
    q_rows = q.flatten(0, 1)
    if not in_order:
        q_rows, visited = q_rows.index_select(0, rows), visited.index_select(0, rows)
    o_rows = torch.empty_like(q_rows)
    lse_rows = None if lse is None else torch.empty_like(q_rows[..., 0])
    kinds, sizes = kind.unique_consecutive(return_counts=True)
    start = 0
    for value, size in zip(kinds.tolist(), sizes.tolist(), strict=True):
        (count, has_tail), stop = divmod(value, 2), start + size
        if count == 0:
            o_rows[start:stop] = 0
            if lse_rows is not None:
                lse_rows[start:stop] = -torch.inf
            start = stop
            continue
        keys = count * block_n
        # Enough rows at once to hide the cost of a call, few enough for their scores to stay in L2.
        width = torch.get_num_threads() * max(2, SCORE_BLOCKS // count)
        k_buf, v_buf = k.new_empty(2, min(width, size) * count, block_n * head_dim)
        scores = k.new_empty(min(width, size), block_m, keys)
        for first in range(start, stop, width):
            part = slice(first, min(first + width, stop))
            n = part.stop - first
            index = visited[part, :count].flatten()
            torch.index_select(k, 0, index, out=k_buf[: n * count])
            torch.index_select(v, 0, index, out=v_buf[: n * count])
            k_part, v_part = (x[: n * count].view(n, keys, head_dim) for x in (k_buf, v_buf))
            score = scores[:n]
            query = q_rows[part]
            torch.baddbmm(score, query, k_part.mT, beta=0, alpha=softmax_scale, out=score)
            if has_tail:
                score[:, :, keys - block_n + tail :] = -torch.inf
            if lse_rows is not None:
                lse_rows[part] = score.logsumexp(-1)
            torch.softmax(score, -1, out=score)
            torch.bmm(score, v_part, out=o_rows[part])
        start = stop
    if in_order:
        o.copy_(o_rows.view_as(q).transpose(0, 1))
    else:
        o[i, h] = o_rows.to(o.dtype)
    if lse is not None and lse_rows is not None:
        lse[h, i] = lse_rows


def _add_summaries(
    call: AttentionCall, b: int, q: Tensor, o: Tensor, lse: Tensor, q_mask: Tensor
) -> None:
    """Merge the summaries of skipped blocks into o ``[Mb, H, block_m, D]`` and lse, in fp32."""
    assert call.summary is not None and call.symbols is not None
    symbols = replace(
        call.symbols, q_bits=call.symbols.q_bits[b : b + 1], kv_bits=call.symbols.kv_bits[b : b + 1]
    )
    parts = (call.summary.k, call.summary.v, call.summary.log_n)
    summary = Summary(*(x[b : b + 1] for x in parts))
    kv_len = None if call.kv_len is None else call.kv_len[b : b + 1]
    bias = summary_bias(summary, symbols, kv_len)[0]  # [H, Mb, S]
    k, v = (x[0].float().transpose(0, 1) for x in (summary.k, summary.v))  # [Hkv, S, D]
    for h, rows in enumerate(q_mask & (bias > -torch.inf).any(-1)):
        key_head = h // (len(q) // len(k))
        for i in rows.nonzero().flatten().tolist():
            score = q[h, i] @ k[key_head].mT * call.softmax_scale + bias[h, i]
            more = score.logsumexp(-1)
            total = torch.logaddexp(lse[h, i], more)
            o[i, h] *= (lse[h, i] - total).exp()[:, None]
            o[i, h] += (score - total[:, None]).exp() @ v[key_head]
            lse[h, i] = total


def _to_blocks(x: Tensor, block: int) -> Tensor:
    """``[S, H, D]`` in any dtype -> fp32 ``[H, blocks, block, D]``, the tail zero."""
    seqlen, num_heads, head_dim = x.shape
    blocks = x.new_empty(num_heads, -(-seqlen // block) * block, head_dim, dtype=torch.float32)
    blocks[:, :seqlen] = x.transpose(0, 1)
    if seqlen < blocks.shape[1]:
        blocks[:, seqlen:] = 0
    return blocks.unflatten(1, (-1, block))
