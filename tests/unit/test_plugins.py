"""The plug-ins of other servers, in small copies of those; tests/plugins has the real ones."""

import importlib
import logging
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fake_servers
from flashomni import accelerate, engine_of
from flashomni.lab import zoo
from flashomni.plugins import _asked, sglang, vllm_omni

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "fora:interval=2"
PLUGINS = {"sglang": sglang, "vllm-omni": vllm_omni}


@pytest.fixture(scope="module")
def pipe():
    pipe = zoo.random_pipeline("tiny-image", heads=2, head_dim=32, dual=1, single=1).pipe
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def servers(pipe, monkeypatch):
    """Both servers, the recipe asked for, and what they are told; the pipeline bare behind it."""
    hooks = fake_servers.install(monkeypatch)
    monkeypatch.setenv(_asked.VARIABLE, RECIPE)
    monkeypatch.setattr(_asked, "version", lambda name: PLUGINS[name].TRIED)
    log = logging.getLogger("flashomni")
    monkeypatch.setattr(log, "parent", log.parent)  # vLLM-Omni's plug-in sets it
    told = SimpleNamespace(cache_dit_config=None, model=pipe)
    told.diffusion_attention_config = SimpleNamespace(default=None)
    yield SimpleNamespace(hooks=hooks, told=told, load=lambda name: LOAD[name](pipe, told, hooks))
    engine = engine_of(pipe)
    if engine is not None:
        engine.remove()
    pipe.transformer.set_attention_backend("native")  # of the whole process, too
    pipe.transformer.reset_attention_backend()


def load_in_sglang(pipe, told, hooks):
    sglang.activate()
    fake_servers.apply(hooks)
    return fake_servers.DiffusersPipeline(pipe, told).diffusers_pipe


def load_in_vllm_omni(pipe, told, hooks):
    vllm_omni.activate()
    loader = fake_servers.DiffusersPipelineLoader(None, told)
    return loader.load_model("cpu", load_format="diffusers", device=torch.device("cpu"))._pipeline


LOAD = {"sglang": load_in_sglang, "vllm-omni": load_in_vllm_omni}


def picture(pipe):
    noise = torch.Generator().manual_seed(3)
    return pipe("a red circle", num_inference_steps=6, height=32, width=32, output_type="pt",
                generator=noise).images  # fmt: skip


@pytest.mark.parametrize("name", PLUGINS)
def test_the_picture_is_that_of_accelerate(name, servers, pipe):
    """The same bits as without a server, by the model's adapter, and some of it is skipped."""
    dense = picture(pipe)
    with accelerate(pipe, RECIPE):
        expected = picture(pipe)
    loaded = servers.load(name)
    assert loaded is pipe
    assert torch.equal(picture(loaded), expected) and not torch.equal(expected, dense)
    summary = engine_of(pipe).report()
    assert summary.tier == "adapter" and summary.flops_skipped > 0


@pytest.mark.parametrize("name", PLUGINS)
@pytest.mark.parametrize("value", [None, "", " "])
def test_installed_is_not_asked_for(name, value, monkeypatch):
    """Without the variable a server's process imports and changes nothing."""
    monkeypatch.delenv(_asked.VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(_asked.VARIABLE, value)
    before = set(sys.modules)
    PLUGINS[name].activate()
    assert set(sys.modules) == before


@pytest.mark.parametrize("name", PLUGINS)
def test_what_fails_is_said_and_fails(name, servers, pipe, monkeypatch, caplog):
    """Servers go on without a plug-in that fails to register; this fails where a model loads."""
    monkeypatch.setenv(_asked.VARIABLE, "balancd")
    with pytest.raises(ValueError, match="recipe must be") as told:
        servers.load(name)
    assert "unset it to serve without FlashOmni" in told.value.__notes__[0]
    (record,) = (record for record in caplog.records if record.levelno == logging.ERROR)
    assert "FLASHOMNI_RECIPE=balancd: recipe must be" in record.getMessage()
    assert "Unset it to serve without FlashOmni" in record.getMessage()
    assert engine_of(pipe) is None


def test_pipelines_of_sglang_are_refused(servers):
    """Before their weights are loaded; nothing is served dense that was asked to skip."""
    servers.load("sglang")

    class OwnPipeline(fake_servers.ComposedPipelineBase):
        pass

    with pytest.raises(NotImplementedError, match=r"OwnPipeline is SGLang's own.*--backend diff"):
        OwnPipeline("black-forest-labs/FLUX.1-dev", servers.told)


def test_cache_dit_beside_it_is_refused(servers, pipe):
    servers.told.cache_dit_config = "config.yaml"
    with pytest.raises(NotImplementedError, match="--cache-dit-config has the same blocks"):
        servers.load("sglang")
    assert engine_of(pipe) is None


@pytest.mark.parametrize("given", [{}, {"load_format": "default"}, {"load_format": "custom"}])
def test_pipelines_of_vllm_omni_are_refused(servers, given):
    """Before their weights are loaded."""
    vllm_omni.activate()
    loader = fake_servers.DiffusersPipelineLoader(None, servers.told)
    with pytest.raises(NotImplementedError, match="pass --diffusion-load-format diffusers"):
        loader.load_model("cpu", **given)


def test_an_attention_that_the_user_chose_is_kept(servers, pipe):
    """vLLM-Omni always sets one; only the one of its options is a choice."""
    servers.told.diffusion_attention_config.default = "_native_math"
    servers.load("vllm-omni")
    picture(pipe)
    summary = engine_of(pipe).report()
    assert summary.tier != "adapter" and any("_native_math" in note for note in summary.notes)


def test_vllm_omni_may_activate_twice(servers):
    """It loads its plug-ins wherever it needs them, several times in a process."""
    vllm_omni.activate()
    once = fake_servers.DiffusersPipelineLoader.load_model
    vllm_omni.activate()
    assert fake_servers.DiffusersPipelineLoader.load_model is once


def test_the_log_goes_where_vllm_writes(servers):
    """Of its loggers only `vllm` has handlers."""
    vllm_omni.activate()
    assert logging.getLogger("flashomni").parent is logging.getLogger("vllm")


@pytest.mark.parametrize("name", PLUGINS)
def test_another_version_is_said(name, servers, monkeypatch, caplog):
    """Or one that is not known: a server built from a checkout."""

    def unknown(name):
        raise _asked.PackageNotFoundError(name)

    monkeypatch.setattr(_asked, "version", lambda name: "9.9")
    PLUGINS[name].activate()
    monkeypatch.setattr(_asked, "version", unknown)
    PLUGINS[name].activate()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "this is 9.9" in said[0] and "no known version" in said[1]
    assert all(f"tried with {name} {PLUGINS[name].TRIED}" in each for each in said)


def test_servers_find_the_plug_ins():
    """The groups are those that servers read, and an entry is a function."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = project["entry-points"]
    assert groups.keys() == {"sglang.multimodal_gen.plugins", "vllm_omni.general_plugins"}
    for entries in groups.values():
        assert list(entries) == ["flashomni"]
        module, _, function = entries["flashomni"].partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_the_page_and_the_environments_name_the_versions():
    """docs/serving.md, what `make plugins-test` installs, and the plug-ins say the same ones."""
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    for name, plugin in PLUGINS.items():
        wanted = ROOT / f"tests/plugins/{name.replace('-', '_')}.txt"
        lines = wanted.read_text(encoding="utf-8").replace("[diffusion]", "").splitlines()
        assert f"{name}=={plugin.TRIED}" in lines and plugin.TRIED in page
