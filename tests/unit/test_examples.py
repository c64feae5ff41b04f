"""The scripts of examples/ run as they stand, on pipelines as small as they get."""

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import diffusers
import pytest
import torch
from tiny_models import fill_gates

from flashomni.lab import zoo
from flashomni.models import adapters

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SMALL = {"heads": 2, "head_dim": 32, "dual": 1, "single": 1}


def transformer(name, **changes):
    tiny = {**adapters()[name].sizes["tiny"], "num_layers": 2, **changes}
    model = adapters()[name].build("tiny").from_config(tiny).eval()
    fill_gates(model)
    return model


def scheduler():
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


def text(width, *more):
    """What stands for the text encoders: a prompt's embeddings, and what comes with them."""
    return lambda *args, **kwargs: (torch.ones(1, 7, width) * 0.1, *more)


def flux():
    return zoo.random_pipeline("tiny-image", **SMALL).pipe


def hunyuan_video():
    pipe = zoo.random_pipeline("tiny-video", **SMALL).pipe
    encode = pipe.encode_prompt
    short = {"prompt_template": {"template": "{}", "crop_start": 0}, "max_sequence_length": 64}
    pipe.encode_prompt = lambda **kwargs: encode(**{**kwargs, **short})
    return pipe


def wan():
    vae = diffusers.AutoencoderKLWan(base_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()
    expert = {"in_channels": 16, "out_channels": 16}
    parts = {
        part: transformer("WanTransformer3DModel", **expert)
        for part in ("transformer", "transformer_2")
    }
    pipe = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=scheduler(),
        boundary_ratio=0.8,
        **parts,
    )
    width = parts["transformer"].config.text_dim
    pipe.encode_prompt = text(width, torch.zeros(1, 7, width))
    return pipe


def qwen_image():
    vae = diffusers.AutoencoderKLQwenImage(base_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    model = transformer("QwenImageTransformer2DModel", in_channels=64, out_channels=16)
    parts = {"text_encoder": None, "tokenizer": None, "transformer": model}
    pipe = diffusers.QwenImagePipeline(vae=vae.eval(), scheduler=scheduler(), **parts)
    width = model.config.joint_attention_dim
    pipe.encode_prompt = text(width, torch.ones(1, 7, dtype=torch.long))
    return pipe


VIDEO = "--height 64 --width 96 --frames 9"
RUNS = {
    "flux": (flux, "FluxPipeline", "--size 64 --steps 10", "accelerated.png"),
    "qwen_image": (
        qwen_image, "QwenImagePipeline", "--size 64 --steps 10 --delta-every 2", "qwen.png",
    ),
    "wan": (wan, "WanPipeline", f"{VIDEO} --steps 24 --recipe quality --low-noise fast", "wan.gif"),
    "hunyuan_video": (
        hunyuan_video, "HunyuanVideoPipeline", f"{VIDEO} --steps 10 --offload", "hunyuan.gif",
    ),
    "own_model": (None, "", "--tokens 200 --steps 12", ""),
    "tune": (
        flux, "DiffusionPipeline", "--size 64 --steps 8 --speedup 1.5 --tries 1", "recipe.png",
    ),
}  # fmt: skip


def load(name):
    spec = spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def slow(name):
    return name if name == "own_model" else pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", map(slow, RUNS))
def test_an_example_runs(name, tmp_path, monkeypatch, capsys):
    """From its command line to its picture, and layers are left out on the way."""
    build, pipeline, options, picture = RUNS[name]
    monkeypatch.chdir(tmp_path)
    if build is not None:
        torch.manual_seed(0)
        pipe = build()
        pipe.set_progress_bar_config(disable=True)
        monkeypatch.setattr(
            getattr(diffusers, pipeline), "from_pretrained", lambda model, torch_dtype: pipe
        )
    load(name).main(options.split())
    said = capsys.readouterr().out
    assert "FLOPs skipped" in said and " 0.0% of the transformer" not in said, said
    assert "bypass" in said or "dispatch" in said, said
    assert not picture or (tmp_path / picture).stat().st_size > 100
    if name == "tune" and "the preset stays" not in said:
        assert json.loads((tmp_path / "recipe.json").read_text())["tuned"]


def test_every_example_is_run_and_named():
    """By this file, and by the page beside them."""
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert scripts == set(RUNS)
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"]({name}.py)" in page for name in scripts)
