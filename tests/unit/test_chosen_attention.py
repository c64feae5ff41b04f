"""Whose attention runs where the user has chosen one in diffusers: of a model, of the process."""

import pytest
import torch
from tiny_models import build, output

import flashomni
from flashomni.engine import Recipe
from flashomni.models import adapters

pytestmark = pytest.mark.usefixtures("no_grad")

FORA = Recipe.of("fora", interval=3, warmup=0.0, level="layers")
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def of_process(report):
    return [note for note in report.notes if "is chosen for the whole process" in note]


@pytest.mark.usefixtures("diffusers_attention")
def test_an_attention_backend_of_the_user_is_kept():
    """Set before: whole-layer caching around it, and no adapter; the report says so."""
    model, given = adapters()["FluxTransformer2DModel"].tiny()
    model.eval()
    stock = model(**given, return_dict=False)[0]
    model.set_attention_backend("_native_math")
    math = model(**given, return_dict=False)[0]
    with flashomni.accelerate(model, FORA) as engine:
        for step in range(6):
            engine.step(step, 7)
            torch.testing.assert_close(model(**given, return_dict=False)[0], math, **CLOSE)
        report = engine.report()
    assert any("bypass" in step["layer_kinds"] for step in report.steps)
    assert report.tier == "generic"
    assert "attention backend '_native_math' is the user's: kept" in report.notes
    model.reset_attention_backend()
    with flashomni.accelerate(model, "lossless") as engine:
        engine.step(0, 2)
        torch.testing.assert_close(model(**given, return_dict=False)[0], stock, **CLOSE)
        assert engine.report().tier == "adapter"


@pytest.mark.usefixtures("diffusers_attention")
def test_a_backend_that_is_set_later_is_kept_from_the_next_generation_on():
    """A model without an adapter follows; the report says whose attention ran."""
    model, given = build("ErnieImageTransformer2DModel")
    stock = output(model, given)
    with flashomni.accelerate(model, FORA) as engine:
        for backend in (None, "_native_math"):
            if backend is not None:
                model.set_attention_backend(backend)
            for step in range(5):
                engine.step(step, 6)
                torch.testing.assert_close(output(model, given), stock, **CLOSE)
            kept = [note for note in engine.report().notes if "is the user's: kept" in note]
            assert bool(kept) == (backend is not None)


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "LTXVideoTransformer3DModel"])
def test_an_attention_of_the_whole_process_is_named(name, caplog):
    """Ours runs, and log and report say so: of the generation that it was chosen in."""
    from diffusers.models.attention_dispatch import attention_backend

    model, given = adapters()[name].tiny()
    model.eval()
    with flashomni.accelerate(model, "lossless") as engine:
        for backend in ("native", "_native_math", "native"):
            with attention_backend(backend):
                engine.step(0, 1)
                model(**given)
            report, is_chosen = engine.report(), backend != "native"
            assert report.tier == "adapter" and len(of_process(report)) == is_chosen
    assert not is_chosen and caplog.text.count("attention backend '_native_math'") == 1


@pytest.mark.slow
@pytest.mark.usefixtures("diffusers_attention")
def test_what_is_set_on_the_model_is_no_choice_of_the_process():
    """Though diffusers makes it one, too; a model beside it does not keep it."""
    model, given = adapters()["FluxTransformer2DModel"].tiny()
    beside, _ = adapters()["FluxTransformer2DModel"].tiny()
    model.set_attention_backend("_native_math")
    for each, said in ((model, 0), (beside, 1)):
        with flashomni.accelerate(each.eval(), "lossless") as engine:
            engine.step(0, 1)
            each(**given)
            assert len(of_process(engine.report())) == said


@pytest.mark.slow
def test_an_attention_that_is_not_torchs_is_watched_anew(monkeypatch):
    """Whose attention runs depends on what diffusers calls, which the process may change."""
    from diffusers.models.attention_dispatch import (
        AttentionBackendName,
        _AttentionBackendRegistry,
        attention_backend,
    )

    def flex(query, key, value, scale=None, **_):
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        return (scores.softmax(-1) @ v).transpose(1, 2)

    backends = _AttentionBackendRegistry._backends
    monkeypatch.setitem(backends, AttentionBackendName.FLEX, flex)
    model, given = build("ErnieImageTransformer2DModel")
    ours = "blocks on FlashOmni's op"
    with flashomni.accelerate(model, "lossless") as engine:
        for backend in ("native", "flex", "native"):
            with attention_backend(backend):
                for step in range(3):
                    engine.step(step, 3)
                    output(model, given)
            report = engine.report()
            assert any(ours in note for note in report.notes) == (backend == "native")
            assert len(of_process(report)) == (backend == "flex")
