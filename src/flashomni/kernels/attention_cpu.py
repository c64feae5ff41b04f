"""Block-sparse attention on the CPU: gathers the visited key blocks and multiplies only those.

Query blocks that visit the same number of key blocks are batched, so that every core works on a
query block of its own; buffers are reused, because fresh pages cost as much as the arithmetic.
Nothing is skipped when all bits are 1: then torch's fused attention runs.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from flashomni.kernels.attention import AttentionCall
from flashomni.kernels.dispatch import register
from flashomni.symbols import Grid, Symbols


def _refuses(call: AttentionCall) -> list[str]:
    device = call.q.device.type
    return [] if device == "cpu" else [f"tensors are on {device}, this backend is for cpu"]


@register("attention", "cpu", rank=10, refuses=_refuses)
def run(call: AttentionCall) -> None:
    q_mask = kv_mask = None
    if call.symbols is not None:
        q_mask, kv_mask = call.symbols.q_mask(), call.symbols.kv_mask()
        if q_mask.all() and kv_mask.all():
            q_mask = kv_mask = None
    seqlen_kv = call.k.shape[1]
    kv_lens = [seqlen_kv] * len(call.q) if call.kv_len is None else call.kv_len.tolist()
    for b, kv_len in enumerate(kv_lens):
        kv_len = min(kv_len, seqlen_kv)
        if q_mask is None and call.lse is None and kv_len > 0:
            _dense(call, b, kv_len)
        else:
            symbols = call.symbols or _dense_symbols(call)
            rows = symbols.q_mask()[b] if q_mask is None else q_mask[b]
            visits = symbols.kv_mask()[b] if kv_mask is None else kv_mask[b]
            _sparse(call, b, kv_len, rows, visits, symbols.grid.block_m, symbols.grid.block_n)


def _dense_symbols(call: AttentionCall) -> Symbols:
    grid = Grid(call.q.shape[1], call.k.shape[1])
    return Symbols.dense(grid, call.q.shape[0], call.q.shape[2])


def _dense(call: AttentionCall, b: int, kv_len: int) -> None:
    q, k, v = (x.transpose(1, 2) for x in (call.q[b : b + 1], call.k[b : b + 1], call.v[b : b + 1]))
    o = torch.nn.functional.scaled_dot_product_attention(
        q,
        k[:, :, :kv_len],
        v[:, :, :kv_len],
        scale=call.softmax_scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    call.out[b] = o[0].transpose(0, 1)


def _sparse(
    call: AttentionCall,
    b: int,
    kv_len: int,
    q_mask: Tensor,
    kv_mask: Tensor,
    block_m: int,
    block_n: int,
) -> None:
    """One batch item: q_mask ``[H, Mb]``, kv_mask ``[H, Mb, Nb]``."""
    num_heads, head_dim = call.q.shape[2:]
    group = num_heads // call.k.shape[2]
    num_kv_blocks = -(-kv_len // block_n)
    tail = kv_len % block_n
    q = _to_blocks(call.q[b] * call.softmax_scale, block_m)  # [H, Mb, block_m, D]
    k = _to_blocks(call.k[b, :kv_len], block_n).flatten(2)  # [Hkv, Nb, block_n * D]
    v = _to_blocks(call.v[b, :kv_len], block_n).flatten(2)
    kv_mask = kv_mask[..., :num_kv_blocks]

    batches = defaultdict(list)
    for h, i in q_mask.nonzero().tolist():
        visited = kv_mask[h, i].nonzero()[:, 0]
        # Blocks ascend, so a partly filled last block is the last one visited.
        ragged = bool(tail) and len(visited) > 0 and int(visited[-1]) == num_kv_blocks - 1
        batches[len(visited), ragged].append((h, i, visited + (h // group) * num_kv_blocks))

    size = 2 * torch.get_num_threads()
    for (count, ragged), rows in batches.items():
        if count == 0:
            for h, i, _ in rows:
                _store(call, b, h, i, block_m, None, None)
            continue
        width = min(size, len(rows))
        keys = count * block_n
        k_buf, v_buf = q.new_empty(2, width * count, block_n * head_dim)
        score, prob = q.new_empty(2, width, block_m, keys)
        o = q.new_empty(width, block_m, head_dim)
        for start in range(0, len(rows), width):
            part = rows[start : start + width]
            n = len(part)
            index = torch.cat([visited for _, _, visited in part])
            torch.index_select(k.flatten(0, 1), 0, index, out=k_buf[: n * count])
            torch.index_select(v.flatten(0, 1), 0, index, out=v_buf[: n * count])
            query = torch.stack([q[h, i] for h, i, _ in part])
            k_part = k_buf[: n * count].view(n, keys, head_dim)
            v_part = v_buf[: n * count].view(n, keys, head_dim)
            torch.bmm(query, k_part.mT, out=score[:n])
            if ragged:
                score[:n, :, keys - block_n + tail :] = -torch.inf
            torch.softmax(score[:n], -1, out=prob[:n])
            torch.bmm(prob[:n], v_part, out=o[:n])
            lse = None if call.lse is None else score[:n].logsumexp(-1)
            for slot, (h, i, _) in enumerate(part):
                _store(call, b, h, i, block_m, o[slot], None if lse is None else lse[slot])


def _to_blocks(x: Tensor, block: int) -> Tensor:
    """``[S, H, D]`` in any dtype -> fp32 ``[H, blocks, block, D]``, the tail zero."""
    seqlen, num_heads, head_dim = x.shape
    blocks = x.new_empty(num_heads, -(-seqlen // block) * block, head_dim, dtype=torch.float32)
    blocks[:, :seqlen] = x.transpose(0, 1)
    blocks[:, seqlen:] = 0
    return blocks.unflatten(1, (-1, block))


def _store(
    call: AttentionCall, b: int, h: int, i: int, block_m: int, o: Tensor | None, lse: Tensor | None
) -> None:
    """Write one query block; ``None`` stands for a row that visited nothing."""
    rows = slice(i * block_m, min((i + 1) * block_m, call.q.shape[1]))
    count = rows.stop - rows.start
    if o is None:
        call.out[b, rows, h] = 0
    else:
        call.out[b, rows, h] = o[:count]
    if call.lse is not None:
        call.lse[b, h, rows] = -torch.inf if lse is None else lse[:count]
