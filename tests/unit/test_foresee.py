"""What would happen to a folder: the same as what happens, without its weights."""

import json

import pytest
from tiny_models import TINY, build
from typer.testing import CliRunner

import flashomni
from flashomni.cli import app
from flashomni.models import adapters, foresee

NAMES = ["SD3Transformer2DModel", "HunyuanDiT2DModel", "Flux3Transformer2DModel"]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_what_happens(name, tmp_path):
    """Tier, lists and sizes are those of the accelerated model."""
    model, _ = build(name)
    model.save_pretrained(tmp_path)
    (found,) = foresee(tmp_path)
    with flashomni.accelerate(model, "lossless") as engine:
        assert found.tier == engine.report().tier
    assert not found.refused and found.transformer == name
    assert found.parameters == sum(p.numel() for p in model.parameters())
    files = tmp_path.glob("*.safetensors")
    assert found.weight_bytes == sum(path.stat().st_size for path in files) > 0
    for path, count in found.blocks.items():
        assert count == len(model.get_submodule(path))


def test_weights_are_not_read(tmp_path):
    """The files may hold anything: only their sizes are taken."""
    model, _ = build("SD3Transformer2DModel")
    model.save_config(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights at all")
    (found,) = foresee(tmp_path)
    assert found.weight_bytes == 17 and found.tier == "adapter"


def pipeline(folder, name, **more):
    """A folder of a pipeline with two transformers of a class, the second one not there."""
    import diffusers

    getattr(diffusers, name)(**TINY[name][0]).save_config(folder / "transformer")
    index = {
        "_class_name": "SomePipeline", "transformer": ["diffusers", name],
        "transformer_2": [None, None], "vae": ["diffusers", "AutoencoderKL"], **more,
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_the_command_line_shows_it(tmp_path):
    """Each part, what is kept for each token, and the reasons of a refusal."""
    folder = pipeline(tmp_path, "SD3Transformer2DModel", transformer_2=["mine", "MyTransformer"])
    done = CliRunner().invoke(app, ["doctor", str(folder)], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    for words in ("SD3Transformer2DModel", "adapter", "of every block", "KiB a token", "refused",
                  "has no such class"):  # fmt: skip
        assert words in done.output
    assert "torch" in done.output and "gemm_q" in done.output  # and what it always says


def test_quantised_weights_are_named(tmp_path):
    """The configuration says so; the class is built without them."""
    folder = pipeline(tmp_path, "SD3Transformer2DModel")
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": {"quant_method": "torchao"}}))
    (found,) = foresee(folder)
    assert found.tier == "adapter" and "quantised" in found.notes[0]


def test_a_variant_says_why_its_adapter_does_not_run_it(tmp_path):
    """As the report would."""
    import diffusers

    adapter = adapters()["HunyuanVideoTransformer3DModel"]
    config = {**adapter.tiny()[0].config, "image_condition_type": "token_replace"}
    config.pop("_use_default_values")
    diffusers.HunyuanVideoTransformer3DModel.from_config(config).save_config(tmp_path)
    (found,) = foresee(tmp_path)
    assert found.tier == "declared" and "without the adapter" in found.notes[0]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "must be one of a diffusers pipeline"),
        ({"config.json": "{}"}, "must be one of a diffusers pipeline"),
        ({"model_index.json": "["}, "must be a JSON object"),
        ({"model_index.json": '{"_class_name": "X", "unet": ["a", "UNet"]}'}, "X with unet"),
    ],
)
def test_other_folders_are_refused(files, words, tmp_path):
    """By what they are, in one sentence."""
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=words):
        foresee(tmp_path)
    done = CliRunner().invoke(app, ["doctor", str(tmp_path)])
    assert done.exit_code == 2
