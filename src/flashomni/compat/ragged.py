"""The authors' attention wrapper: requests of different lengths side by side in one tensor.

Letters in shapes: B requests, M and N query and key tokens of all requests together, H query heads,
Hkv key heads (Hkv divides H), D head_dim.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partialmethod
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from flashomni.compat.packing import check_indptr
from flashomni.compat.plan import (
    Group,
    Plan,
    group_equal,
    read_backend,
    read_dtype,
    read_requests,
    read_scale,
    refuse_masks,
    refuse_options,
)
from flashomni.kernels import sparse_attention
from flashomni.kernels.common.checks import check_device, check_dtype, check_shape
from flashomni.kernels.common.rows import tile_mask
from flashomni.symbols import Symbols

LOG2_E = math.log2(math.e)


class BatchFlashOmniFAWithRaggedKVWrapper:
    """Block-sparse attention over requests of different lengths; ``plan`` once, ``run`` often.

    Our ops need no scratch memory: of the workspace only its device counts. Neighbouring requests
    of equal lengths run as one batch, so a batch of equal lengths is one launch.

    Attributes that programs written for the authors' package read after ``plan``:
    ``_qo_indptr_buf``, ``_kv_indptr_buf`` (on the device), ``_sparse_block_size_for_q``,
    ``_sparse_block_size_for_kv``, and ``_sparse_info_indptr_base``, ``_sparse_kv_info_indptr_base``
    (where the unpacked bits of each request start: what ``segment_packbits`` takes).

    Args:
        float_workspace_buffer: any tensor on the device of the inputs.
        kv_layout: ``"NHD"`` (k and v are ``[N, Hkv, D]``) or ``"HND"`` (``[Hkv, N, D]``).
        use_cuda_graph: copy the plan into the two buffers below. Lengths become part of a captured
            graph, so all plans must have the lengths of the first.
        qo_indptr_buf: int32 ``[B + 1]``, needed and used only with ``use_cuda_graph``.
        kv_indptr_buf: like ``qo_indptr_buf``.
        custom_mask_buf: not supported, must be ``None``.
        mask_indptr_buf: not supported, must be ``None``.
        backend: ``"auto"`` takes the best that accepts; ``"fa2"`` and ``"fa3"`` take our kernels of
            that generation, ``portable`` and ``sm90``; or the name of one of ours.

    Raises:
        ValueError: an argument is none of the above.
        NotImplementedError: a custom mask, or a backend that cannot run on this machine.
    """

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Tensor | None = None,
        kv_indptr_buf: Tensor | None = None,
        custom_mask_buf: Tensor | None = None,
        mask_indptr_buf: Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        if kv_layout not in ("NHD", "HND"):
            raise ValueError(f"kv_layout must be 'NHD' or 'HND', got {kv_layout!r}")
        refuse_masks(custom_mask_buf=custom_mask_buf, mask_indptr_buf=mask_indptr_buf)
        if use_cuda_graph:
            for name, buffer in (
                ("qo_indptr_buf", qo_indptr_buf),
                ("kv_indptr_buf", kv_indptr_buf),
            ):
                if buffer is None:
                    raise ValueError(f"{name} must be a tensor with use_cuda_graph=True, got None")
                check_indptr(name, buffer)
                check_device(name, buffer, float_workspace_buffer.device)
        self.device = float_workspace_buffer.device
        self._kv_layout = kv_layout
        self._use_cuda_graph = use_cuda_graph
        self._qo_indptr_buf = qo_indptr_buf
        self._kv_indptr_buf = kv_indptr_buf
        self._backend = read_backend(backend)
        self._plan: Plan | None = None

    @property
    def is_cuda_graph_enabled(self) -> bool:
        return self._use_cuda_graph

    def reset_workspace_buffer(
        self, float_workspace_buffer: Tensor, int_workspace_buffer: Tensor
    ) -> None:
        """Other workspaces on the same device; like the first ones they are not needed."""
        check_device("float_workspace_buffer", float_workspace_buffer, self.device)
        check_device("int_workspace_buffer", int_workspace_buffer, self.device)

    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        sparse_block_size_for_q: int = 128,
        sparse_block_size_for_kv: int = 128,
        head_dim_vo: int | None = None,
        custom_mask: Tensor | None = None,
        packed_custom_mask: Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: str | torch.dtype = "float16",
        kv_data_type: str | torch.dtype | None = None,
    ) -> None:
        """Say what the coming runs are about. Reads both indptr on the host.

        Args:
            qo_indptr: int32 or int64 ``[B + 1]``, the first query row of each request; from 0 to M.
            kv_indptr: the same for keys; a request with queries needs at least one key.
            num_qo_heads: H, a multiple of ``num_kv_heads``.
            num_kv_heads: Hkv.
            head_dim_qk: D.
            sparse_block_size_for_q: tokens of a query block, a positive multiple of 16.
            sparse_block_size_for_kv: tokens of a key block, a positive multiple of 16.
            head_dim_vo: must be D or ``None``.
            custom_mask: not supported, must be ``None``.
            packed_custom_mask: not supported, must be ``None``.
            causal: not supported, must be ``False``.
            pos_encoding_mode: ``"NONE"``; the others are not supported.
            use_fp16_qk_reduction: not supported, must be ``False``.
            logits_soft_cap: not supported, must be ``None`` or 0.
            sm_scale: scale of the scores, ``D ** -0.5`` by default.
            rope_scale: not supported, must be ``None`` or 1.
            rope_theta: not supported, must be ``None`` or 1e4.
            q_data_type: dtype of q, or its name.
            kv_data_type: must be ``q_data_type`` or ``None``.

        Raises:
            ValueError: an argument is out of range.
            NotImplementedError: an argument asks for what is not supported.
        """
        refuse_masks(custom_mask=custom_mask, packed_custom_mask=packed_custom_mask)
        refuse_options(
            causal,
            pos_encoding_mode,
            use_fp16_qk_reduction,
            logits_soft_cap,
            rope_scale,
            rope_theta,
        )
        dtype = read_dtype("q_data_type", q_data_type)
        if kv_data_type is not None and read_dtype("kv_data_type", kv_data_type) != dtype:
            raise NotImplementedError(f"kv_data_type must be q_data_type, got {kv_data_type}")
        if head_dim_vo not in (None, head_dim_qk):
            raise NotImplementedError(f"head_dim_vo must be {head_dim_qk}, got {head_dim_vo}")
        requests = read_requests(qo_indptr, kv_indptr)
        plan = Plan(
            requests,
            group_equal(requests),
            num_qo_heads,
            num_kv_heads,
            head_dim_qk,
            sparse_block_size_for_q,
            sparse_block_size_for_kv,
            dtype,
            read_scale(sm_scale),
        )
        if self._use_cuda_graph:
            self._keep_in_buffers(qo_indptr, kv_indptr, plan)
        else:
            self._qo_indptr_buf = qo_indptr.to(self.device)
            self._kv_indptr_buf = kv_indptr.to(self.device)
        self._sparse_block_size_for_q = sparse_block_size_for_q
        self._sparse_block_size_for_kv = sparse_block_size_for_kv
        self._sparse_info_indptr_base = self._starts(plan.q_bits())
        self._sparse_kv_info_indptr_base = self._starts(plan.kv_bits())
        self._plan = plan

    begin_forward = plan

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sparse_info: Tensor | None = None,
        sparse_kv_info: Tensor | None = None,
        sparse_info_indptr: Tensor | None = None,
        sparse_kv_info_indptr: Tensor | None = None,
        is_full: bool = False,
        *args: Any,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
    ) -> Any:
        """Attention of every request over its own keys. Never waits for the device.

        Cached tiles (S_c = 0) of ``out`` and ``lse`` are not written; in a new ``out`` they are
        zero, in a new ``lse`` they are -inf. A computed row whose key blocks are all skipped is
        zero, its ``lse`` -inf. With GQA the symbols have one bit a query head.

        Args:
            q: ``[M, H, D]``.
            k: ``[N, Hkv, D]``, or ``[Hkv, N, D]`` with ``kv_layout="HND"``.
            v: like ``k``.
            sparse_info: uint8, S_c of all requests in the authors' packing, little bit order.
            sparse_kv_info: uint8, S_s of all requests.
            sparse_info_indptr: int32 ``[B + 1]``, the byte at which each request starts.
            sparse_kv_info_indptr: the same for S_s.
            is_full: compute everything; the four tensors above are not read.
            *args: not supported, must be empty.
            out: ``[M, H, D]``.
            lse: fp32 ``[M, H]``, gets the logarithm to base 2 of each row's softmax sum.
            return_lse: return ``lse`` as well.

        Returns:
            ``out``, or ``(out, lse)`` with ``return_lse``.

        Raises:
            RuntimeError: ``plan`` was not called.
            ValueError: a tensor does not fit the plan.
            NotImplementedError: no backend accepts; the message gives the reasons of each.
        """
        plan = self._plan
        if plan is None:
            raise RuntimeError("plan must be called before run")
        if args:
            raise NotImplementedError(f"args must be empty after is_full, got {len(args)} more")
        k, v = self._check_inputs(plan, q, k, v)
        shape = tuple(q.shape)
        if out is None:
            out = q.new_zeros(shape)
        else:
            self._check("out", out, shape, q.dtype)
        if lse is not None:
            self._check("lse", lse, shape[:2], torch.float32)
        elif return_lse:
            lse = q.new_full(shape[:2], -torch.inf, dtype=torch.float32)
        symbols: list[Symbols] | list[None] = [None] * len(plan.groups)
        if not is_full:
            packed = (sparse_info, sparse_kv_info, sparse_info_indptr, sparse_kv_info_indptr)
            symbols = plan.symbols(*packed, self.device)
        for group, bits in zip(plan.groups, symbols, strict=True):
            _attend(plan, group, q, k, v, bits, out, lse, self._backend)
        return (out, lse) if return_lse else out

    run_return_lse = partialmethod(run, return_lse=True)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sparse_info: Tensor | None = None,
        sparse_kv_info: Tensor | None = None,
        sparse_info_indptr: Tensor | None = None,
        sparse_kv_info_indptr: Tensor | None = None,
        is_full: bool = False,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        *,
        return_lse: bool = False,
    ) -> Any:
        """Deprecated by the authors: :meth:`run` after these options have replaced the plan's."""
        refuse_options(
            causal,
            pos_encoding_mode,
            use_fp16_qk_reduction,
            logits_soft_cap,
            rope_scale,
            rope_theta,
        )
        if self._plan is not None:
            self._plan = replace(self._plan, softmax_scale=read_scale(sm_scale))
        symbols = (sparse_info, sparse_kv_info, sparse_info_indptr, sparse_kv_info_indptr)
        return self.run(q, k, v, *symbols, is_full, return_lse=return_lse)

    forward_return_lse = partialmethod(forward, return_lse=True)

    def end_forward(self) -> None:
        """Deprecated by the authors, without effect."""

    def _keep_in_buffers(self, qo_indptr: Tensor, kv_indptr: Tensor, plan: Plan) -> None:
        """Copy the plan into the user's buffers; a captured graph keeps the lengths it saw."""
        for name, buffer, indptr in (
            ("qo_indptr", self._qo_indptr_buf, qo_indptr),
            ("kv_indptr", self._kv_indptr_buf, kv_indptr),
        ):
            assert buffer is not None
            check_shape(name, indptr, buffer.shape)
            if self._plan is not None and self._plan.requests != plan.requests:
                raise NotImplementedError(
                    f"{name}: with use_cuda_graph=True all plans must have the lengths of the "
                    "first, a captured graph keeps them"
                )
            buffer.copy_(indptr)

    def _starts(self, counts: list[int]) -> Tensor:
        """int32 ``[B + 1]`` on the device: where each of the runs of ``counts`` starts."""
        starts = list(accumulate(counts, initial=0))
        return torch.tensor(starts, dtype=torch.int32, device=self.device)

    def _check(self, name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        check_shape(name, tensor, shape)
        check_dtype(name, tensor, (dtype,))
        check_device(name, tensor, self.device)

    def _check_inputs(self, plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Check the inputs against the plan; k and v as ``[N, Hkv, D]``."""
        tokens, heads, head_dim = plan.num_kv_tokens, plan.num_kv_heads, plan.head_dim
        shape = (tokens, heads, head_dim)
        if self._kv_layout == "HND":
            shape = (heads, tokens, head_dim)
        self._check("q", q, (plan.num_q_tokens, plan.num_qo_heads, head_dim), plan.dtype)
        self._check("k", k, shape, plan.dtype)
        self._check("v", v, shape, plan.dtype)
        return (k, v) if self._kv_layout == "NHD" else (k.transpose(0, 1), v.transpose(0, 1))


def _attend(
    plan: Plan,
    group: Group,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    symbols: Symbols | None,
    out: Tensor,
    lse: Tensor | None,
    backend: str | None,
) -> None:
    """One launch: write the group's rows of ``out`` and ``lse``."""
    queries = group.queries(q)
    count, seqlen_q, num_heads, _ = queries.shape
    natural = None  # log-sum-exp to base e
    if lse is not None:
        natural = q.new_empty(count, num_heads, seqlen_q, dtype=torch.float32)
    sparse_attention(
        queries,
        group.keys(k),
        group.keys(v),
        symbols,
        out=group.queries(out),
        softmax_scale=plan.softmax_scale,
        lse=natural,
        backend=backend,
    )
    if lse is not None and natural is not None:
        target, new = group.queries(lse), natural.mT * LOG2_E
        if symbols is not None:
            new = torch.where(tile_mask(symbols, seqlen_q, 0), new, target)
        target.copy_(new)
