"""Pipelines of real size with random weights: published configurations, nothing to download.

Transformer, scheduler and pipeline are diffusers' own classes. Text encoders, tokenizers and VAE
are left out: the text is given as embeddings, the result stays latent. Time does not depend on the
values of weights, but what a policy chooses does: random weights give attention maps that are
nearly uniform, so densities of data-dependent policies are not those of a trained model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flashomni.lab.e2e.newer import FAMILIES, SEPARATE, SIZES
from flashomni.lab.e2e.size import Size
from flashomni.models import transformers_of
from flashomni.models.flux import Flux
from flashomni.models.hunyuan_video import HunyuanVideo
from flashomni.models.wan import Wan

WAN = Wan.sizes["published"]
HUNYUAN = HunyuanVideo.sizes["published"]
FLUX_DEV = Flux.sizes["published"]
TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "num_layers": 1,
    "num_single_layers": 2,
    "pooled_projection_dim": 32,
}


MODELS = {
    "hunyuan-33k": Size("hunyuan", HUNYUAN, 256, 200, 720, 1280, 33),
    "flux-1024": Size("flux", FLUX_DEV, 512, 512, 1024, 1024),
    "flux-2048": Size("flux", FLUX_DEV, 512, 512, 2048, 2048),
    # Two transformers of 40 blocks would be 80 blocks of 0.2 s in half of the steps each.
    "wan22": Size(
        "wan22", {**WAN, "num_layers": 8}, 512, 512, 720, 1280, 81,
        note="8 of the 40 blocks of each of the two transformers", joint=False,
    ),
    "tiny-hunyuan": Size(
        "hunyuan",
        {**HUNYUAN, **TINY, "num_refiner_layers": 1, "text_embed_dim": 24}
        | {"rope_axes_dim": (4, 14, 14)},
        text=75, valid=30, height=160, width=128, frames=13,
    ),
    "tiny-flux": Size(
        "flux",
        {**FLUX_DEV, **TINY, "joint_attention_dim": 24, "axes_dims_rope": (4, 14, 14)},
        text=77, valid=77, height=288, width=304,
    ),
    "tiny-wan22": Size(
        "wan22",
        {**WAN, "num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2}
        | {"text_dim": 24, "freq_dim": 32, "ffn_dim": 96},
        text=77, valid=77, height=160, width=128, frames=13, joint=False,
    ),
    **SIZES,
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A pipeline that is ready to be called.

    Args:
        name: one of ``MODELS``.
        pipe: a diffusers pipeline without text encoders and VAE.
        call: arguments of the call besides steps, generator and callback.
        tokens: length of the sequence that attends to itself.
        device: where it runs.
        seed: of the initial noise.
        calls: of a transformer in each step: guidance in a call of its own makes two.
        note: what is not as published.
    """

    name: str
    pipe: Any
    call: dict[str, Any] = field(repr=False)
    tokens: int
    device: torch.device
    seed: int = 0
    calls: int = 1
    note: str = ""

    @property
    def transformers(self) -> list[Any]:
        """Of the pipeline, in the order in which they run."""
        return list(transformers_of(self.pipe).values())

    @property
    def shared(self) -> bool:
        """Whether several transformers share the steps."""
        return len(self.transformers) > 1

    def refuse_shared(self, what: str) -> None:
        """Refuse what looks at the calls of one transformer.

        Raises:
            NotImplementedError: there are several, or a step has more than one call.
        """
        if self.shared or self.calls > 1:
            raise NotImplementedError(
                f"{what} of {self.name} is not supported: it follows one transformer that is "
                "called once a step"
            )


def build(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    structure: float = 0.0,
    size: Size | None = None,
) -> Model:
    """Build a pipeline with random weights directly on its device, without a copy in fp32.

    Weights are torch's own initialisation of each layer, which keeps latents of order 1.

    Args:
        name: one of ``MODELS``.
        device: where it runs.
        dtype: of weights and inputs.
        seed: of weights, text and noise.
        structure: how far attention is from uniform, 0 or more; see :func:`_structure`.
        size: instead of that of the name: other blocks, another picture.

    Raises:
        ValueError: unknown model, a negative structure, or one of a model that cannot have any.
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    if not 0.0 <= structure < math.inf:
        raise ValueError(f"structure must be at least 0, got {structure}")
    from diffusers.utils import logging

    logging.set_verbosity_error()  # each attention backend that is set would be called experimental
    size = MODELS[name] if size is None else size
    with _defaults(device, dtype, seed):
        pipe, call = _FAMILIES[size.family](size)
    for number, transformer in enumerate(transformers_of(pipe).values()):
        transformer.eval().requires_grad_(False)
        _structure(transformer, structure, seed + number)
    pipe.set_progress_bar_config(disable=True)
    calls = 2 if size.family in ("wan22", *SEPARATE) else 1
    return Model(name, pipe, call, size.tokens, device, seed, calls, size.note)


@contextmanager
def _defaults(device: torch.device, dtype: torch.dtype, seed: int) -> Iterator[None]:
    """What is made here is made on ``device`` in ``dtype``, from a seed that leaks nowhere."""
    before = torch.get_default_dtype()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.device(device):
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def _hunyuan(size: Size) -> tuple[Any, dict[str, Any]]:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )

    pipe = HunyuanVideoPipeline(
        transformer=HunyuanVideoTransformer3DModel(**size.config),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, vae=None,
    )  # fmt: skip
    call = _text(size, size.config["text_embed_dim"])
    call["prompt_attention_mask"] = (torch.arange(size.text) < size.valid)[None]
    return pipe, {**call, "num_frames": size.frames, "guidance_scale": 6.0}


def _flux(size: Size) -> tuple[Any, dict[str, Any]]:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    pipe = FluxPipeline(
        transformer=FluxTransformer2DModel(**size.config),
        # as published with FLUX.1-dev
        scheduler=FlowMatchEulerDiscreteScheduler(
            base_image_seq_len=256, base_shift=0.5, max_image_seq_len=4096, max_shift=1.15,
            shift=3.0, use_dynamic_shifting=True,
        ),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, vae=None,
    )  # fmt: skip
    call = _text(size, size.config["joint_attention_dim"])
    return pipe, {**call, "guidance_scale": 3.5, "max_sequence_length": size.text}


def _wan22(size: Size) -> tuple[Any, dict[str, Any]]:
    from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    pipe = WanPipeline(
        transformer=WanTransformer3DModel(**size.config),
        transformer_2=WanTransformer3DModel(**size.config),
        # as published with Wan 2.2 T2V A14B
        boundary_ratio=0.875,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        text_encoder=None, tokenizer=None, vae=None,
    )  # fmt: skip
    text, negative = torch.randn(2, 1, size.text, size.config["text_dim"])
    return pipe, {
        "prompt_embeds": text,
        "negative_prompt_embeds": negative,
        "height": size.height,
        "width": size.width,
        "num_frames": size.frames,
        "guidance_scale": 4.0,
        "guidance_scale_2": 3.0,
        "output_type": "latent",
    }


_FAMILIES: dict[str, Callable[[Size], tuple[Any, dict[str, Any]]]] = {
    "hunyuan": _hunyuan,
    "flux": _flux,
    "wan22": _wan22,
    **FAMILIES,
}


def _text(size: Size, width: int) -> dict[str, Any]:
    """Random embeddings in place of a prompt, and the size of the picture."""
    pooled: Tensor = torch.randn(1, size.config["pooled_projection_dim"])
    return {
        "prompt_embeds": torch.randn(1, size.text, width),
        "pooled_prompt_embeds": pooled,
        "height": size.height,
        "width": size.width,
        "output_type": "latent",
    }


def _structure(model: Any, structure: float, seed: int) -> None:
    """Give queries and keys a common direction, so that attention depends on position.

    Means over a block of random queries vanish, and with them all that a policy could see. A
    direction that all queries and keys of a head share survives, and RoPE turns it by position: a
    token then attends to its neighbours in space and time, and text to some places more than to
    others. Its length grows by layer from 0 to ``structure`` (the random part has about 0.6), so
    layers differ. It is not the attention of a trained model.
    """
    if structure == 0:
        return
    lists = ("blocks", "transformer_blocks", "single_transformer_blocks")
    blocks: list[Any] = [block for name in lists for block in getattr(model, name, ())]
    generator = torch.Generator().manual_seed(seed)
    attentions = [block.attn1 if hasattr(block, "attn1") else block.attn for block in blocks]
    if not all(getattr(getattr(x, "to_q", None), "bias", None) is not None for x in attentions):
        raise ValueError(
            f"structure must be 0 for {type(model).__name__}: its queries and keys have no bias"
        )
    if not attentions:
        raise ValueError(f"structure must be 0 for {type(model).__name__}: no blocks are known")
    for index, attn in enumerate(attentions):
        direction = torch.randn(attn.to_q.out_features, generator=generator)
        direction *= structure * index / max(len(attentions) - 1, 1)
        for name in ("to_q", "to_k", "add_q_proj", "add_k_proj"):
            linear: nn.Module | None = getattr(attn, name, None)
            bias = getattr(linear, "bias", None)
            if bias is not None:
                bias.add_(direction.to(bias))
