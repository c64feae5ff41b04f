"""Model folders that are damaged: one sentence each, and nothing in them is run."""

import json
import logging
import shutil

import pytest
from safetensors.torch import load_file, save_file

from flashomni.lab import zoo
from flashomni.lab.generation import Generation


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A whole one, saved."""
    folder = tmp_path_factory.mktemp("zoo") / "model"
    size = {"heads": 2, "head_dim": 32, "dual": 1, "single": 1}
    zoo.random_pipeline("tiny-image", **size).pipe.save_pretrained(folder)
    return folder


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rename_class(path):
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "transformer": ["diffusers", "NoSuchModel"]}))


def make_pickle(path):
    path.with_suffix("").with_suffix(".bin").write_bytes(path.read_bytes())
    path.unlink()


def other_model(path):
    """The weights of the pipeline's other text encoder: a valid file."""
    shutil.copy(path.parent.parent / "text_encoder_2" / path.name, path)


def fewer_layers(path):
    """A valid file of the same class that lacks what is in the encoder's layers."""
    tensors = {name: t for name, t in load_file(path).items() if ".layers." not in name}
    save_file(tensors, path, metadata={"format": "pt"})


def wrong_call(path):
    path.write_text(json.dumps({"call": {"hieght": 64, "generator": 1}}))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("text_encoder/model.safetensors", cut, "cannot be loaded"),
        ("text_encoder/config.json", cut, "cannot be loaded"),
        ("vae/diffusion_pytorch_model.safetensors", cut, "cannot be loaded"),
        ("tokenizer/tokenizer.json", cut, "cannot be loaded"),
        ("scheduler/scheduler_config.json", cut, "cannot be loaded"),
        ("model_index.json", cut, "cannot be loaded"),
        ("model_index.json", rename_class, "cannot be loaded: .*NoSuchModel"),
        ("text_encoder/model.safetensors", make_pickle, "a pickle, which may run code"),
        ("text_encoder/model.safetensors", other_model, "of another model: .* of CLIPTextModel"),
        ("text_encoder/model.safetensors", fewer_layers, "of another model: .* of CLIPTextModel"),
        ("flashomni.json", wrong_call, "got 'generator', 'hieght'"),
    ],
)
def test_damage_is_one_sentence(saved, tmp_path, name, damage, message):
    """It says which model and what is wrong with it."""
    folder = shutil.copytree(saved, tmp_path / "model")
    damage(folder / name)
    with pytest.raises(ValueError, match=message) as caught:
        zoo.load(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_few_missing_weights_are_named(saved, tmp_path, caplog):
    """One norm is not in the file: random, which a reader of the log learns."""
    folder = shutil.copytree(saved, tmp_path / "model")
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    lost = next(name for name in tensors if name.endswith("final_layer_norm.bias"))
    save_file({n: t for n, t in tensors.items() if n != lost}, path, metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING, "flashomni"):
        zoo.load(folder)
    (message,) = [one for one in caplog.messages if "weights of" in one]
    assert "1 of the" in message and "'final_layer_norm.bias' for one" in message
    caplog.clear()
    with caplog.at_level(logging.WARNING, "flashomni"):
        zoo.load(saved)
    assert not caplog.messages


@pytest.mark.parametrize("call", [{"height": "tall", "width": 64}, {"guidance_scale": [1]}])
def test_a_wrong_value_in_a_call_is_one_sentence(saved, tmp_path, call):
    """It is found in the warm-up, before anything is timed."""
    folder = shutil.copytree(saved, tmp_path / "model")
    (folder / "flashomni.json").write_text(json.dumps({"call": call}))
    generation = Generation(zoo.load(folder), None, 0)
    with pytest.raises(ValueError, match="FluxPipeline fails with call"):
        generation.warm_up()
