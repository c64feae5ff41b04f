"""Inputs of attention that are hard for a softmax whose reference the first keys choose.

Each kind takes an amount; ``nats`` are of the scores after scaling. The reference of an anchored
softmax is the maximum of whatever is visited first, so both ends of the keys are tried.
"""

import math

import torch

# kind -> amounts
KINDS = {
    "gain": (4.0, 12.0, 40.0),  # queries times this
    "self": (8.0,),  # query m is this times key m: a peak on the diagonal
    "rise": (20.0, 90.0, 150.0, 400.0),  # nats from the first key to the last
    "fall": (20.0, 90.0, 150.0, 400.0),
    "sink first": (50.0, 120.0, 400.0),  # nats of one key of the first block above the others
    "sink last": (50.0, 120.0, 400.0),
    "values": (2.0**30, 2.0**-100),  # times this; as all but fp16 can hold
    "equal": (1.0,),  # keys
    "minus infinity": (1.0,),  # scores of nearly every third key
    "nan": (1.0,),  # one key
}
CASES = [(kind, amount) for kind, amounts in KINDS.items() for amount in amounts]


def attention_inputs(kind, amount, shape, scale, dtype, device):
    """``q, k, v`` of ``shape``: (batch, seqlen_q, seqlen_kv, heads, key heads, head_dim)."""
    batch, seqlen_q, seqlen_kv, heads, kv_heads, head_dim = shape
    q = torch.randn(batch, seqlen_q, heads, head_dim, device=device)
    k, v = torch.randn(2, batch, seqlen_kv, kv_heads, head_dim, device=device)
    if kind == "gain":
        q = q * amount
    elif kind == "self":
        row = torch.arange(seqlen_q, device=device) % seqlen_kv
        q = amount * k[:, row].repeat_interleave(heads // kv_heads, 2)
    elif kind in ("rise", "fall", "sink first", "sink last"):
        along = torch.randn(head_dim, device=device)
        along = along / along.norm()
        q = 0.3 * q + 8 * along
        nat = along / (8 * abs(scale)) * math.copysign(1, scale)  # of a key, to score one nat more
        if kind in ("rise", "fall"):
            start, stop = (0, amount) if kind == "rise" else (amount, 0)
            nats = torch.linspace(start, stop, seqlen_kv, device=device)
            k = 0.3 * k + nats[:, None, None] * nat
        else:
            where = 5 if kind == "sink first" else seqlen_kv - 5
            k[:, min(max(where, 0), seqlen_kv - 1)] = amount * nat
    elif kind == "values":
        v = v * amount
    elif kind == "equal":
        k = k[:, :1].expand_as(k).clone()
    elif kind == "minus infinity":
        q[..., 0] = q[..., 0].abs() + 0.5
        key = torch.arange(seqlen_kv, device=device)
        hidden = (key % 3 == 1) & (key % 16 != 0)  # no tile of keys is hidden whole
        k[:, hidden, :, 0] = -math.copysign(math.inf, scale)
    elif kind == "nan":
        k[:, seqlen_kv // 2, 0, 0] = math.nan
    else:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    return q.to(dtype), k.to(dtype), v.to(dtype)
