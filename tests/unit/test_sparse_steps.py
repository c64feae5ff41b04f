"""The section ``sparse``: when columns are chosen, in which steps they are used, what it costs."""

import logging
from dataclasses import dataclass, replace

import pytest
import torch

import flashomni
from conftest import call, generation, run
from flashomni.engine import Recipe
from flashomni.engine.state import room
from flashomni.models import adapters
from flashomni.policies import Policy
from flashomni.symbols import Symbols

pytestmark = pytest.mark.usefixtures("no_grad")

STEPS, LAYERS = 10, 4
BLOCKS = {"block_m": 32, "block_n": 32}
EVERY = {"interval": 1, "warmup": 0.0, "in_computed": True, **BLOCKS}


@dataclass(frozen=True)
class Noted(Policy):
    """Random columns, half of them, and a note of each choice."""

    amount = "share"
    caches = False
    name = "noted"

    share: float = 0.5

    def __call__(self, site):
        NOTES.append((site.step, site.layer, self.share))
        shape = site.q.shape[0], site.q.shape[2], site.grid.num_q_blocks, site.grid.num_kv_blocks
        drawn = torch.Generator().manual_seed(len(NOTES))
        mask = torch.rand(shape, generator=drawn) < self.share
        CHOSEN[site.layer] = Symbols.pack(torch.ones_like(mask[..., 0]), mask, site.grid)
        return CHOSEN[site.layer]


NOTES, CHOSEN = [], {}


@pytest.fixture(autouse=True)
def forget():
    NOTES.clear()
    CHOSEN.clear()


def test_columns_are_chosen_at_given_steps_and_kept(flux):
    """The policy is asked at steps 2 and 6 alone, with the amount of their progress."""
    model, inputs = flux
    recipe = Recipe.of(
        Noted(), choose_at=(2, 6), dense_steps=3, amounts=[[0, 0.0], [1, 1.0]], **EVERY
    )
    outputs, report = run(model, inputs, recipe)
    assert [note[:2] for note in NOTES] == [(s, i) for s in (2, 6) for i in range(LAYERS)]
    assert [note[2] for note in NOTES[::LAYERS]] == pytest.approx([0.3, 0.7])
    stock, _ = run(model, inputs, "dense")
    assert torch.equal(outputs[:3], stock[:3])
    assert not torch.allclose(outputs[3], stock[3], atol=1e-4)
    assert all(step["kv_density"] == [1.0] * LAYERS for step in report.steps[:3])
    kept = [step["kv_density"] for step in report.steps[3:6]]
    assert kept[0] == kept[1] == kept[2] and max(kept[0]) < 0.6


@pytest.mark.parametrize("carry", ["off", "hold"])
def test_a_dense_last_step_chooses_nothing_that_no_step_uses(flux, carry):
    """Though its caches are gone, and with them that something was chosen; nor does it make D."""
    model, inputs = flux
    recipe = Recipe.of(
        Noted(), interval=3, warmup=0.2, choose_at=(1,), carry=carry, refresh=3, **BLOCKS
    )
    with flashomni.accelerate(model, recipe) as engine:
        generation(engine, model, inputs, 8)
        last = engine.report().steps[-1]
    assert [note[:2] for note in NOTES] == [(1, i) for i in range(LAYERS)]
    assert (last["kind"], last["does"]) == ("full", [])


@pytest.mark.parametrize(
    ("choose_at", "says"),
    [("update", "no step was an Update"), ((99,), "none of these steps"), ("computed", "")],
)
def test_a_report_says_that_no_columns_were_chosen(flux, choose_at, says):
    """Full steps alone choose nothing at Updates: dense from the first step to the last."""
    _, summary = run(*flux, Recipe.of(Noted(), choose_at=choose_at, **EVERY), steps=3)
    notes = [note for note in summary.notes if "never chosen" in note]
    assert [says in note for note in notes] == [True] * bool(says)
    assert (summary.flops_skipped == 0) == bool(says)


@pytest.mark.parametrize("summaries", [0, 4])
def test_what_was_spent_is_what_was_computed(flux, summaries):
    """Recomputed of the symbols themselves: live pairs, summaries, refreshes, dense steps."""
    model, inputs = flux
    recipe = Recipe.of(
        Noted(),
        choose_at=(1,),
        dense_steps=2,
        carry="hold",
        refresh=3,
        summaries=summaries,
        **EVERY,
    )
    _, report = run(model, inputs, recipe)
    grid = CHOSEN[0].grid
    share = summaries * grid.num_kv_blocks / grid.seqlen_kv
    spent = 0.0
    for layer in range(LAYERS):
        mask = CHOSEN[layer].kv_mask()
        mask[:, :, grid.text_q_mask(mask.device)] = True  # with carry text rows visit everything
        live = mask.float().mean().item()
        for step in range(STEPS):
            refreshes = step >= 1 and (step - 1) % 3 == 0
            spent += 1.0 if step == 0 else (1.0 if refreshes else live) + share
    assert report.attention_spent == pytest.approx(spent / (LAYERS * STEPS), abs=1e-5)
    assert f"attention spent: {report.attention_spent:.3f} of dense" in str(report)
    dense = run(model, inputs, "dense")[1]
    assert dense.attention_spent == 1.0 and "attention spent" not in str(dense)


def carried(**settings):
    usual = {"choose_at": (1,), "carry": "extrapolate", "refresh": 3, "summaries": 4}
    settings = {**EVERY, **usual, **settings}
    if "schedule" in settings:
        settings = {k: v for k, v in settings.items() if k not in ("interval", "warmup")}
    return Recipe.of(Noted(), **settings)


@pytest.mark.slow
def test_carry_brings_sparse_steps_nearer_to_dense(flux):
    """Drifting latents: less error with carry than without, less still where it is renewed."""
    model, inputs = flux
    stock, _ = run(model, inputs, "dense")

    def error(recipe):
        NOTES.clear()
        return (run(model, inputs, recipe)[0] - stock).norm()

    without = error(carried(carry="off"))
    once, often = error(carried(carry="hold", refresh=0)), error(carried(carry="hold"))
    assert often < once < without


def test_branches_and_runs_that_begin_late(flux):
    """A run that begins at step 4, and a branch that joins: the first sparse step is a refresh."""
    model, inputs = flux
    stock = call(model, inputs)
    with flashomni.accelerate(model, carried()) as engine:
        for step in range(4, STEPS):
            engine.step(step, STEPS, "cond")
            torch.testing.assert_close(call(model, inputs), stock, atol=2e-5, rtol=1e-4)
            if step >= 6:
                engine.step(step, STEPS, "uncond")
                torch.testing.assert_close(call(model, inputs), stock, atol=2e-5, rtol=1e-4)
        dense = [s["step"] for s in engine.report().steps if s["branch"] == "uncond"]
    assert [note[0] for note in NOTES] == [4] * LAYERS + [6] * LAYERS and dense[0] == 6


def test_a_batch_that_changes_starts_afresh(flux):
    """Another CFG batch in the midst of a generation: chosen anew, with a refresh."""
    model, inputs = flux
    single = {key: value if "ids" in key else value[:1] for key, value in inputs.items()}
    stock = {size: call(model, given) for size, given in ((2, inputs), (1, single))}
    with flashomni.accelerate(model, carried()) as engine:
        for step in range(6):
            size, given = (2, inputs) if step < 3 else (1, single)
            engine.step(step, STEPS)
            torch.testing.assert_close(call(model, given), stock[size], atol=2e-5, rtol=1e-4)
    assert [note[0] for note in NOTES[::LAYERS]] == [1, 3]


def test_other_columns_without_a_refresh_are_an_error(flux):
    """D of other symbols is never added, however they came about."""
    model, inputs = flux
    with flashomni.accelerate(model, carried()) as engine:
        for step in range(3):
            engine.step(step, STEPS)
            call(model, inputs)
        layer = engine._runtime.last.branches["call"].layers[2]
        own = layer.columns.symbols
        layer.columns = replace(layer.columns, symbols=replace(own, kv_bits=own.kv_bits.clone()))
        engine.step(3, STEPS)
        with pytest.raises(RuntimeError, match="symbols that change need a refresh in the same"):
            call(model, inputs)


def test_the_memory_of_carry_is_said_before(flux, caplog):
    """At least what is kept afterwards, in the log and in the report."""
    model, inputs = flux
    with (
        caplog.at_level(logging.INFO, "flashomni"),
        flashomni.accelerate(model, carried()) as engine,
    ):
        engine.step(0, STEPS)
        call(model, inputs)
        (said,) = [r.getMessage() for r in caplog.records if "carry keeps" in r.getMessage()]
        number, unit = said.split("at most ")[1].split()[:2]
        promised = float(number) * {"KiB": 2**10, "MiB": 2**20}[unit]
        for step in range(1, 6):
            engine.step(step, STEPS)
            call(model, inputs)
        branch = engine._runtime.last.branches["call"]
        kept = sum(t.nbytes for layer in branch.layers for t in layer.carry.tensors())
        assert 0.5 * promised < kept <= 1.1 * promised
        assert any("carry keeps at most" in note for note in engine.report().notes)


@pytest.mark.slow
def test_without_room_carry_is_off_by_name(flux, monkeypatch, caplog):
    """Where neither device nor host has it: as a recipe without carry, with a warning."""
    model, inputs = flux
    monkeypatch.setattr(room, "free_bytes", lambda device: 1000)
    outputs, report = run(model, inputs, carried())
    assert any("carry is off in branch 'call'" in note for note in report.notes)
    assert "carry is off" in caplog.text
    NOTES.clear()
    assert torch.equal(outputs, run(model, inputs, carried(carry="off"))[0])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float8"])
def test_carry_is_kept_as_histories_are(flux, dtype):
    """Half and a quarter of the memory, and nearly the same."""
    model, inputs = flux
    full, wide = run(model, inputs, carried())
    NOTES.clear()
    less, narrow = run(model, inputs, carried(history_dtype=dtype))
    assert narrow.cache_bytes < 0.6 * wide.cache_bytes
    torch.testing.assert_close(full, less, atol=5e-2, rtol=5e-2)


@pytest.mark.slow
def test_symbols_are_saved_and_used_again(flux, tmp_path):
    """The same bits in another run, without a choice; the mass and the error go with them."""
    model, inputs = flux
    path = tmp_path / "symbols.safetensors"
    recipe = carried(measure=True, choose_at=(0,))
    with flashomni.accelerate(model, recipe) as engine:
        first = generation(engine, model, inputs)
        engine.save_symbols(path)
    NOTES.clear()
    again, _ = run(model, inputs, recipe.replace(symbols=str(path), choose_at="update"))
    assert not NOTES and torch.equal(again, first)
    from safetensors.torch import load_file

    tensors = load_file(path)
    assert tensors["call/steps"].tolist() == [0, 3, 6, 9]
    mass, error = tensors["call/mass"], tensors["call/error"]
    assert mass.shape == error.shape == (4, LAYERS)
    assert ((mass > 0.2) & (mass < 1)).all() and error[0].isnan().all() and (error[1:] < 1).all()


def test_symbols_of_something_else_are_refused(flux, tmp_path):
    """What differs is named: block size, tokens, heads, branch, layers."""
    model, inputs = flux
    path = tmp_path / "symbols.safetensors"
    with flashomni.accelerate(model, carried()) as engine:
        with pytest.raises(ValueError, match="no symbols were chosen"):
            engine.save_symbols(path)
        generation(engine, model, inputs)
        engine.save_symbols(path)
    used = carried(symbols=str(path))
    with pytest.raises(ValueError, match=r"have block_m 32, not 64; block_n 32, not 64"):
        run(model, inputs, used.replace(block_m=64, block_n=64))
    shorter = {
        **inputs, "encoder_hidden_states": inputs["encoder_hidden_states"][:, :70],
        "txt_ids": inputs["txt_ids"][:70],
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"have seqlen_q 419, not 412; .* text \[0, 77\], not"):
        run(model, shorter, used)
    with flashomni.accelerate(model, used) as engine:
        engine.step(0, STEPS, "other")
        with pytest.raises(ValueError, match=r"have none of 'other/.*'; branches in it are call"):
            call(model, inputs)
    with pytest.raises(ValueError, match="cannot be read"):
        run(model, inputs, carried(symbols=str(tmp_path / "none")))
    small, _ = adapters()["WanTransformer3DModel"].tiny()
    with pytest.raises(
        ValueError, match=r"must have all layers of the model, got none of blocks.0"
    ):
        flashomni.accelerate(small, used)


@pytest.mark.parametrize("name", ["adaptive", "first_block"])
def test_schedules_that_decide_late(flux, name):
    """Constant inputs: exact in every step, in layers that Dispatch steps compute too."""
    model, inputs = flux
    stock = call(model, inputs)
    recipe = carried(choose_at=(0,), schedule={"name": name}, degrade_below=1.0)
    with flashomni.accelerate(model, recipe) as engine:
        for step in range(STEPS):
            engine.step(step, STEPS)
            torch.testing.assert_close(call(model, inputs), stock, atol=2e-5, rtol=1e-4)
        report = engine.report()
    assert {"update", "dispatch"} <= {step["kind"] for step in report.steps}
    assert report.attention_spent < 0.7
