"""Pipelines to run: the small ones of flashomni-assets, any local diffusers folder, any Hub id.

A folder may hold a ``flashomni.json`` with a default ``prompt`` and the ``call``: the arguments
that the pipeline is meant to be called with. ``random_pipeline`` builds the small ones with random
weights and fewer layers, out of stock classes and without a file.
"""

from __future__ import annotations

import inspect
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flashomni.lab import small
from flashomni.lab.foreign import check_weights
from flashomni.util.words import one_line

BUNDLED = ("tiny-image", "tiny-video", "tiny-wan")
RANDOM = BUNDLED[:2]  # what random_pipeline builds
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Arguments of a call that a generation sets itself.
OURS = {"self", "prompt", "generator", "output_type", "return_dict", "callback_on_step_end"}
PROMPT = "a large red striped circle left of a small blue square on a green checker floor"
WORDS = (
    "a an and the of on in to with left right above below behind front near moving from "
    "large small red green blue yellow white black orange purple "
    "circle square triangle ring star cross "
    "striped dotted plain checker floor wall light dark cat holding sign"
)


@dataclass(frozen=True)
class Loaded:
    """A pipeline and how to call it.

    Args:
        pipe: a diffusers pipeline.
        prompt: a prompt that suits it.
        call: arguments of the call besides prompt, generator and output type.
        trained: whether its weights are trained (random weights make noise, at the same speed).
        prompts: more prompts that suit it, for an evaluation.
    """

    pipe: Any
    prompt: str = PROMPT
    call: dict[str, Any] = field(default_factory=dict)
    trained: bool = True
    prompts: tuple[str, ...] = (PROMPT,)


def load(
    model: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Loaded:
    """Load a pipeline by name, folder or Hub id.

    Args:
        model: ``tiny-image``, ``tiny-video``, ``tiny-wan``, a local diffusers folder, or a Hub id
            ``org/name``.
        device: where to put it.
        dtype: of its weights.

    Raises:
        ValueError: it is none of these, or cannot be loaded.
    """
    folder = Path(model)
    if str(model) in BUNDLED:
        folder = bundled(str(model))
    is_folder = (folder / "model_index.json").exists()
    is_path = folder.exists() or str(model).startswith(("/", ".", "~"))
    if not is_folder and (is_path or str(model).count("/") != 1):
        raise ValueError(
            f"model must be {', '.join(BUNDLED)}, a diffusers folder (with model_index.json) or a "
            f"Hub id like org/name, got {str(model)!r}"
        )
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()  # the caller shows that it is loading
    source = folder if is_folder else str(model)
    note = read_note(folder) if is_folder else {}
    if is_folder:
        _refuse_pickles(folder)
    try:
        with warnings.catch_warnings():
            # newer diffusers say `dtype`, older ones know only `torch_dtype`
            warnings.simplefilter("ignore", FutureWarning)
            pipe = DiffusionPipeline.from_pretrained(
                source, torch_dtype=dtype, local_files_only=is_folder, use_safetensors=True
            )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # each library below has its own for a file that is cut or foreign
        why = one_line(f"{type(error).__name__}: {error}", 400)
        raise ValueError(f"model {str(model)!r} cannot be loaded: {why}") from error
    if is_folder:
        check_weights(folder, pipe.components)
    _check_call(folder / "flashomni.json", note.get("call", {}), pipe)
    pipe.to(device)
    prompt = note.get("prompt", PROMPT)
    prompts = tuple(note.get("prompts", [prompt]))
    return Loaded(pipe, prompt, dict(note.get("call", {})), prompts=prompts)


def _refuse_pickles(folder: Path) -> None:
    """Weights as pickles are never loaded: they may run code."""
    for path in sorted(folder.glob("*/*")):
        if path.suffix in PICKLES and not any(path.parent.glob("*.safetensors")):
            raise ValueError(
                f"model {str(folder)!r} has the weights {path.parent.name}/{path.name}, a pickle, "
                "which may run code: only .safetensors are loaded"
            )


def _check_call(path: Path, call: dict[str, Any], pipe: Any) -> None:
    """Refuse arguments that the pipeline's call lacks, or that are given by us."""
    allowed = set(inspect.signature(type(pipe).__call__).parameters) - OURS
    wrong = sorted(set(call) - allowed)
    if wrong:
        raise ValueError(
            f"{path}: call of {type(pipe).__name__} takes {', '.join(sorted(allowed))}; "
            f"got {', '.join(map(repr, wrong))}"
        )


def bundled(name: str) -> Path:
    """Where the distribution ``flashomni-assets`` has the pipeline of that name.

    Raises:
        ValueError: it is not installed.
    """
    try:
        from flashomni_assets import folder
    except ModuleNotFoundError as error:
        raise ValueError(
            f"model {name!r} comes with flashomni-assets, which is not installed here: "
            "`pip install ./packages/flashomni-assets` in a checkout of FlashOmni "
            "(the extra 'demo' of flashomni asks for it)"
        ) from error
    return folder(name)


def read_note(folder: Path) -> dict[str, Any]:
    """The ``flashomni.json`` of a folder; empty where there is none.

    Raises:
        ValueError: it is not a JSON object with ``prompt`` a string, ``prompts`` a list of strings
            and ``call`` an object.
    """
    path = folder / "flashomni.json"
    if not path.exists():
        return {}
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    right = isinstance(note, dict) and isinstance(note.get("prompt", ""), str)
    prompts = note.get("prompts", [PROMPT]) if right else []
    right = right and isinstance(prompts, list) and all(isinstance(p, str) for p in prompts)
    if not right or not prompts or not isinstance(note.get("call", {}), dict):
        raise ValueError(
            f'{path} must be {{"prompt": string, "prompts": [string], "call": object}}'
        )
    return note


def random_pipeline(name: str, seed: int = 0, **size: Any) -> Loaded:
    """A small pipeline of a bundled one's classes, with random weights.

    Args:
        name: ``tiny-image`` (FluxPipeline) or ``tiny-video`` (HunyuanVideoPipeline).
        seed: of the weights.
        size: ``heads``, ``head_dim``, ``dual``, ``single``: layers and width of the transformer.
    """
    if name not in RANDOM:
        raise ValueError(f"name must be one of {', '.join(RANDOM)}, got {name!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loaded = (_flux if name == "tiny-image" else _hunyuan)(**size)
    for part in loaded.pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()  # built from a config, a module is in training mode
    return loaded


def _tokenizer(max_length: int) -> Any:
    """A word-level tokenizer: pads on the right, ends with ``</s>``."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate(special + sorted(set(WORDS.split())))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=max_length,
        padding_side="right",  # set later as an attribute it would not be saved
    )


def _rope_axes(head_dim: int) -> tuple[int, int, int]:
    """Three even axes that sum to head_dim, the first the smallest."""
    first = max(head_dim // 16 * 2, 2)
    second = (head_dim - first) // 4 * 2
    return first, second, head_dim - first - second


def _flux(heads: int = 4, head_dim: int = 64, dual: int = 2, single: int = 4) -> Loaded:
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = small.flux(
        _tokenizer(small.CLIP_TOKENS),
        _tokenizer(64),
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        width=32,
        clip_layers=1,
        t5={"d_kv": 16, "d_ff": 64, "num_layers": 1},
        vae={"block_out_channels": (8, 8), "norm_num_groups": 4},
        transformer={
            "num_layers": dual,
            "num_single_layers": single,
            "attention_head_dim": head_dim,
            "num_attention_heads": heads,
            "guidance_embeds": True,
            "axes_dims_rope": _rope_axes(head_dim),
        },
    )
    call = {
        "height": 256,
        "width": 256,
        "num_inference_steps": 28,
        "guidance_scale": 3.5,
        "max_sequence_length": 64,
    }
    return Loaded(pipe, call=call, trained=False)


def _hunyuan(heads: int = 4, head_dim: int = 64, dual: int = 2, single: int = 4) -> Loaded:
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = small.hunyuan_video(
        _tokenizer(256),
        _tokenizer(small.CLIP_TOKENS),
        FlowMatchEulerDiscreteScheduler(shift=7.0),
        channels=4,
        llama={"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 256},
        clip_width=32,
        vae={"block_out_channels": (8, 8, 8), "norm_num_groups": 4},
        transformer={
            "num_layers": dual,
            "num_single_layers": single,
            "attention_head_dim": head_dim,
            "num_attention_heads": heads,
            "guidance_embeds": True,
            "rope_axes_dim": _rope_axes(head_dim),
        },
    )
    call = {
        "height": 128,
        "width": 128,
        "num_frames": 61,
        "num_inference_steps": 28,
        "guidance_scale": 6.0,
        "max_sequence_length": 64,
        "prompt_template": {"template": "{}", "crop_start": 0},
    }
    return Loaded(pipe, call=call, trained=False)
