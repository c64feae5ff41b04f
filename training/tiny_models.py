"""The two small pipelines: stock diffusers and transformers classes, small configurations.

``tiny-image`` is a FluxPipeline (256 x 256 pixels, 4096 image tokens), ``tiny-video`` a
HunyuanVideoPipeline (65 frames of 128 x 128, 17 x 16 x 16 = 4352 video tokens); 64 text tokens.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    HunyuanVideoPipeline,
    WanPipeline,
)
from torch import nn

from flashomni.lab import small
from flashomni.lab.small import CLIP_TOKENS
from training import scenes as scene_lib
from training.word_tokenizers import (
    clip_tokenizer,
    copy_capitals,
    llama_tokenizer,
    t5_tokenizer,
)

TEXT_TOKENS = 64
HEADS, HEAD_DIM = 4, 64
EVAL_PROMPTS = 64
TEMPLATE = {"template": "{}", "crop_start": 0}


@dataclass(frozen=True)
class Stage:
    """One rung of the coarse-to-fine ladder."""

    share: float  # of the transformer's training time
    size: int  # pixels
    frames: int  # 1 for pictures
    batch: int
    shift: float  # of the noise levels; the last stage's is the scheduler's
    reuse: int = 1  # how often a rendered and encoded sample is used, on average
    rate: float = 1e-3


@dataclass(frozen=True)
class Kind:
    """Everything in which the two models' training differs."""

    name: str
    size: int
    frames: int
    stages: tuple[Stage, ...]
    call: dict = field(default_factory=dict)
    default: int = 0  # which of the saved prompts is the default one

    @property
    def video(self) -> bool:
        return self.frames > 1


IMAGE = Kind(
    "tiny-image",
    256,
    1,
    (
        Stage(0.36, 64, 1, 512, 1.7),
        Stage(0.22, 128, 1, 192, 2.3, rate=8e-4),
        Stage(0.42, 256, 1, 64, 4.0, reuse=2, rate=6e-4),
    ),
    {
        "height": 256,
        "width": 256,
        "num_inference_steps": 28,
        "guidance_scale": 1.0,
        "max_sequence_length": TEXT_TOKENS,
    },
)
VIDEO = Kind(
    "tiny-video",
    128,
    65,
    (
        Stage(0.25, 128, 1, 512, 2.0),
        Stage(0.33, 128, 17, 128, 3.5, reuse=3, rate=8e-4),
        Stage(0.42, 128, 65, 48, 5.0, reuse=6, rate=6e-4),
    ),
    {
        "height": 128,
        "width": 128,
        "num_frames": 65,
        "num_inference_steps": 28,
        "guidance_scale": 1.0,
        "max_sequence_length": TEXT_TOKENS,
        "prompt_template": TEMPLATE,
    },
    default=1,
)
KINDS = {"image": IMAGE, "video": VIDEO}


def _image_pipeline(words: list[str]) -> FluxPipeline:
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=math.log(IMAGE.stages[0].shift),
        max_shift=math.log(IMAGE.stages[-1].shift),
        base_image_seq_len=256,
        max_image_seq_len=4096,
        shift=IMAGE.stages[-1].shift,
    )
    return small.flux(
        clip_tokenizer(words, CLIP_TOKENS),
        t5_tokenizer(words, TEXT_TOKENS),
        scheduler,
        width=128,
        clip_layers=2,
        t5={
            "d_kv": 64,
            "d_ff": 256,
            "num_layers": 2,
            "feed_forward_proj": "gated-gelu",
            "dropout_rate": 0.0,
        },
        vae={
            "block_out_channels": (32, 48),
            "norm_num_groups": 8,
            "sample_size": 256,
            "force_upcast": False,
        },
        transformer={
            "num_layers": 2,
            "num_single_layers": 6,
            "attention_head_dim": HEAD_DIM,
            "num_attention_heads": HEADS,
            "guidance_embeds": False,
            "axes_dims_rope": (8, 28, 28),
        },
    )


def _video_pipeline(words: list[str]) -> HunyuanVideoPipeline:
    return small.hunyuan_video(
        llama_tokenizer(words, TEXT_TOKENS),
        clip_tokenizer(words, CLIP_TOKENS),
        FlowMatchEulerDiscreteScheduler(shift=VIDEO.stages[-1].shift),
        channels=8,
        llama={"hidden_size": 96, "intermediate_size": 128, "max_position_embeddings": 128},
        clip_width=128,
        vae={"block_out_channels": (16, 16, 32), "norm_num_groups": 8},
        transformer={
            "num_layers": 2,
            "num_single_layers": 5,
            "attention_head_dim": HEAD_DIM,
            "num_attention_heads": HEADS,
            "guidance_embeds": False,
            "rope_axes_dim": (16, 24, 24),
        },
    )


def _zero_start(transformer: nn.Module) -> None:
    """Every block begins as the identity and the model as zero, which steadies early training."""
    for name, module in transformer.named_modules():
        modulation = name.endswith(".linear") and ".norm" in name
        if modulation or name == "proj_out" or name == "norm_out.linear":
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def build(kind: Kind, seed: int = 0) -> DiffusionPipeline:
    """An untrained pipeline in evaluation mode."""
    torch.manual_seed(seed)
    words = scene_lib.words()
    pipe = _video_pipeline(words) if kind.video else _image_pipeline(words)
    _zero_start(pipe.transformer)
    for part in modules(pipe).values():
        part.eval()
    return pipe


def modules(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    return {n: m for n, m in pipe.components.items() if isinstance(m, nn.Module)}


def tokenize(pipe: DiffusionPipeline, prompts: list[str]) -> dict[str, torch.Tensor]:
    """Token ids as the stock pipeline makes them: "text", "mask" [B, 64]; "clip" [B, 77] if any."""
    if isinstance(pipe, WanPipeline):
        text, clip = pipe.tokenizer, None
    elif isinstance(pipe, HunyuanVideoPipeline):
        text, clip = pipe.tokenizer, pipe.tokenizer_2
    else:
        text, clip = pipe.tokenizer_2, pipe.tokenizer
    long = text(
        prompts, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt"
    )
    if clip is None:
        return {"text": long.input_ids, "mask": long.attention_mask}
    pooled = clip(
        prompts, padding="max_length", max_length=CLIP_TOKENS, truncation=True, return_tensors="pt"
    )
    return {"text": long.input_ids, "mask": long.attention_mask, "clip": pooled.input_ids}


def encode_text(
    pipe: DiffusionPipeline, tokens: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Text states [B, 64, D] and pooled state [B, 128], as the stock pipelines compute them.

    Wan has no pooled state, and zeros where others have states of padding.
    """
    if isinstance(pipe, WanPipeline):
        states = pipe.text_encoder(tokens["text"], tokens["mask"]).last_hidden_state.float()
        states = states * tokens["mask"][..., None]
        return nn.functional.pad(states, (0, 0, 0, TEXT_TOKENS - states.shape[1])), None
    if isinstance(pipe, HunyuanVideoPipeline):
        states = pipe.text_encoder(
            tokens["text"], attention_mask=tokens["mask"], output_hidden_states=True
        ).hidden_states[-3]
        return states, pipe.text_encoder_2(tokens["clip"]).pooler_output
    return pipe.text_encoder_2(tokens["text"])[0], pipe.text_encoder(tokens["clip"]).pooler_output


def save(
    pipe: DiffusionPipeline, folder: str | os.PathLike, kind: Kind, prompts: list[str]
) -> None:
    """Write the pipeline in diffusers' format (bf16, small shards) and its call next to it.

    ``prompts`` come first in the list that evaluations take, then more of the held-out split.
    """
    folder = Path(folder)
    text, words = (
        (pipe.text_encoder, pipe.tokenizer)
        if kind.video
        else (pipe.text_encoder_2, pipe.tokenizer_2)
    )
    copy_capitals(words, text.get_input_embeddings().weight, scene_lib.words())
    for part in modules(pipe).values():
        part.to(torch.bfloat16)
    pipe.save_pretrained(folder, safe_serialization=True, max_shard_size="15MB")
    # transformers loads a model in its config's type, diffusers in float32: without this the text
    # states would be bf16 and the transformer float32, and the stock call would fail.
    for name in ("text_encoder", "text_encoder_2"):
        path = folder / name / "config.json"
        if not path.exists():
            continue  # Wan has one
        config = json.loads(path.read_text())
        config["dtype"] = "float32"
        path.write_text(json.dumps(config, indent=2) + "\n")
    more = heldout_prompts(kind, EVAL_PROMPTS - len(prompts), seed=8)
    note = {"prompt": prompts[kind.default], "prompts": prompts + more, "call": kind.call}
    (folder / "flashomni.json").write_text(json.dumps(note, indent=2) + "\n")


def heldout_prompts(kind: Kind, count: int, seed: int = 7) -> list[str]:
    """``count`` captions, each with a colour and shape never seen together in training."""
    gen = torch.Generator().manual_seed(seed)
    return scene_lib.captions(scene_lib.sample(count, gen, kind.video, "heldout"))
