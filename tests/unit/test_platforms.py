"""Machines that are not here: without Triton, of AMD, Apple or Intel, with Windows.

What they answer is faked where the library asks: `platform.system`, `torch.version.hip`,
`torch.cuda`. What is not there is a sentence with its cure, and everything else runs;
test_determinism.py has a process without Triton.
"""

import logging
import platform

import pytest
import torch

import flashomni
from conftest import SPARSE, generation, make_tiny
from flashomni import dispatch
from flashomni.engine.unserved import Unserved, told
from flashomni.kernels.attention import _measured, sdpa
from flashomni.kernels.attention.op import AttentionCall
from flashomni.kernels.common import configs
from flashomni.lab import doctor
from flashomni.models.generic.attention import Attention
from flashomni.symbols.wide import wide


@pytest.mark.parametrize(
    ("system", "cure"),
    [
        ("Linux", "pip install 'flashomni[gpu]'"),
        ("Windows", "triton-windows is one, and was not tried"),
        ("Darwin", "which there is none of for Darwin"),
    ],
)
def test_a_missing_triton_is_a_sentence_with_its_cure(system, cure, monkeypatch):
    """Not a module's name; an import that fails for another reason is told as it is."""
    monkeypatch.setattr(platform, "system", lambda: system)
    for name in ("triton", "triton.language"):
        text = dispatch._told(ModuleNotFoundError(f"No module named {name!r}", name=name))
        assert text.startswith("needs Triton, which ") and cure in text
    assert dispatch._told(ImportError("no gluon in it")) == "no gluon in it"
    monkeypatch.setitem(dispatch._broken, ("attention", "moon"), f"cannot be imported: {text}")
    with pytest.raises(NotImplementedError, match="moon: cannot be imported: needs Triton"):
        dispatch.select("attention", None, "moon")


@pytest.fixture
def amd(monkeypatch):
    """A card of AMD that calls itself 9.0, as an MI200 does."""
    hopper = pytest.importorskip("flashomni.kernels.common.hopper", reason="needs Triton")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    for asked in (hopper.hopper_refusals, hopper.is_hopper):
        asked.cache_clear()
    dispatch.forget_choices()
    yield hopper
    monkeypatch.undo()
    for asked in (hopper.hopper_refusals, hopper.is_hopper):
        asked.cache_clear()
    dispatch.forget_choices()


def test_a_card_of_amd_is_no_hopper(amd):
    """Its number is the same, its instructions are not; the portable kernels are tried."""
    from flashomni import triton_host
    from flashomni.symbols.choice import _fine_launch

    why = "is for NVIDIA's cards, and this torch is for AMD's (ROCm 6.4)"
    assert amd.hopper_refusals() == [why] and not amd.is_hopper(0)
    for op in ("attention", "gemm_q", "gemm_o", "refresh"):
        assert dispatch.refusals(op)["sm90"] == why
    assert triton_host.available() == []
    assert "portable" in dispatch.backends("attention")
    assert _fine_launch._row_tile(torch.device("cuda")) == _fine_launch.TILE // 2
    if not triton_host.INTERPRETED:
        assert dispatch.has_kernel("attention", "cuda")


@pytest.fixture
def only_definitions(monkeypatch):
    """No kernel is for the device that the tests have."""
    for op in dispatch.OPS:
        dispatch.registered(op)  # whose files register once
    kept = dict(dispatch._registry)
    for name, state in (("_registry", kept), ("_sorted", {}), ("_usable", {})):
        monkeypatch.setattr(dispatch, name, state)
    for key in [key for key, backend in kept.items() if backend.device == "cpu"]:
        del kept[key]
    yield
    monkeypatch.undo()
    dispatch.forget_choices()


@pytest.mark.slow
def test_a_device_without_a_kernel_is_said_once(only_definitions, no_grad, caplog):
    """In the log and in each report; the generation is what the definitions make of it."""
    model, inputs = make_tiny("FluxTransformer2DModel")
    with flashomni.accelerate(model, SPARSE, backend="reference") as engine:
        exact = generation(engine, model, inputs, steps=4)
        assert not [note for note in engine.report().notes if "no attention kernel" in note]
    caplog.set_level(logging.WARNING, "flashomni")
    with flashomni.accelerate(model, SPARSE) as engine:
        for _ in range(2):
            assert torch.equal(generation(engine, model, inputs, steps=4), exact)
        (note,) = (n for n in engine.report().notes if "no attention kernel runs on cpu" in n)
    assert "layers that are cached whole are skipped all the same" in note
    ours = [r.getMessage() for r in caplog.records if r.name == "flashomni"]
    assert ours == [f"FluxTransformer2DModel: {note}"]


def test_apple_and_intel_have_torchs_own_attention():
    """Dense calls; the sentence says what becomes of the others. No choice needs the device."""
    for kind in ("mps", "xpu"):
        assert not dispatch.has_kernel("attention", kind)
        assert f"no attention kernel runs on {kind} here" in told(kind)
        seen = Unserved("Flux", None)
        seen.look(torch.device(kind))
        assert seen.notes() == [told(kind)]
        named = Unserved("Flux", "reference")
        named.look(torch.device(kind))
        assert named.notes() == []
    assert wide(torch.device("mps")) == torch.float32 and wide(torch.device("cpu")) == torch.float64


def test_dense_calls_of_a_device_without_a_kernel_take_torchs_attention():
    """Tensors of the device type meta stand for it: only metadata are looked at."""
    q = torch.empty(1, 300, 2, 32, device="meta")
    call = AttentionCall(q, q, q, torch.empty_like(q), None, None, None, 32**-0.5)
    assert sdpa._refuses(call) == [] and sdpa._prefers(call)
    on_cpu = torch.empty(1, 300, 2, 32)
    other = AttentionCall(on_cpu, on_cpu, on_cpu, on_cpu, None, None, None, 32**-0.5)
    assert sdpa._refuses(other) == ["tensors are on cpu, this backend is for GPUs"]
    assert not sdpa._prefers(other)


def test_a_learned_model_keeps_its_own_attention_there():
    """Nothing of ours would be faster than what it has."""
    q = torch.empty(1, 2, 300, 32, device="meta")
    why = Attention(q, q, q, None, None, None).why_not(None)
    assert why == "no kernel of ours takes float32 on meta"


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A card of that name and number, and nothing in the user's cache folder."""

    def put(name, capability):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        return torch.device("cuda", 0)

    monkeypatch.setenv("FLASHOMNI_CACHE", str(tmp_path))
    for asked in (configs.places, _measured.entries):
        asked.cache_clear()
    yield put
    for asked in (configs.places, _measured.entries):
        asked.cache_clear()


@pytest.mark.parametrize(
    ("name", "capability", "told"),
    [
        ("NVIDIA GeForce RTX 4090", (8, 9), "untuned: chosen on an H200; "),
        ("NVIDIA A100", (8, 0), "of sm_80, untuned for this card; "),
    ],
)
def test_doctor_says_which_tables_a_card_has(card, name, capability, told):
    """Nobody takes an H200's tiles for those of the card at hand."""
    assert doctor.tables(card(name, capability)) == told + doctor.UNMEASURED


def test_doctor_tells_what_runs_a_call_from_what_is_chosen_for_some(amd):
    """Torch's attention has the highest rank, and takes few calls."""
    rows = {name: why for name, why, ops in doctor.in_short() if "attention" in ops.split(", ")}
    assert rows["sdpa"] == doctor.CHOSEN and rows["sm90"].startswith("is for NVIDIA's cards")
    assert [name for name, why in rows.items() if why == "yes"] == ["portable"]
