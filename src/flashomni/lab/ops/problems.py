"""The problems by name; choosing symbols is one of them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from flashomni.lab.ops import attention, baselines, gemm
from flashomni.lab.ops.problem import Baseline, Problem, Request
from flashomni.policies import AttentionSite, make_policy
from flashomni.symbols import Grid


def symbols(request: Request) -> Problem:
    """Choosing the symbols of a layer against dense attention; a ratio of 1 / 0.03 is asked for.

    By the policy ``flashomni``, or where there is no text ``spargeattn``; ``density`` is the share
    of attention mass that is kept.
    """
    shape = request.shape
    size = (1, shape.seqlen, shape.num_heads, shape.head_dim)
    inputs = [(request.randn(*size), request.randn(*size)) for _ in range(request.sets)]
    grid = Grid(shape.seqlen, shape.seqlen, shape.text)
    if shape.text[1] > shape.text[0]:
        left_out = 1 - request.density
        policy = make_policy("flashomni", tau_q=left_out, tau_kv=left_out)
    else:
        policy = make_policy("spargeattn", mass=request.density)
    progress = torch.ones((), device=request.device)
    values = request.randn(*size)
    dense = baselines.torch_sdpa()
    if request.device.type == "cuda":
        dense = baselines.cudnn_sdpa() or dense
    where = "device" if request.device.type == "cuda" else "cpu"
    return Problem(
        where,
        request.density,
        lambda i: policy(AttentionSite.alone(*inputs[i], grid, progress)),
        request.sets,
        {"dense attention": Baseline(lambda i: dense(*inputs[i], values), 1 / 0.03)},
    )


PROBLEMS: dict[str, Callable[[Request], Problem]] = {
    "attention": attention.attention,
    "attention_cached": attention.attention_cached,
    "attention_both": attention.attention_both,
    "attention_redone": attention.attention_redone,
    "decode": attention.decode,
    "gemm_q": gemm.gemm_q,
    "gemm_q_fused": gemm.gemm_q_fused,
    "gemm_o": gemm.gemm_o,
    "gemm_o_interval": gemm.gemm_o_interval,
    "symbols": symbols,
}
