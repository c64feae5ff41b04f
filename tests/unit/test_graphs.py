"""Calls as graphs: the bits are the same, whatever happens in between; and why there are none."""

import contextlib
import functools
import gc
import weakref

import pytest
import torch
from recorder import TapeRecorder

import flashomni
from conftest import ONES, SPARSE, STEPS, call, first_item, generation, residue, run
from flashomni.engine import graphs
from flashomni.engine.capture import Uncapturable, Watch
from flashomni.engine.layer_step import LayerStep
from flashomni.engine.state.mirror import mirror
from flashomni.models import adapters

pytestmark = pytest.mark.usefixtures("no_grad")
CACHING = "taylorseer:interval=3,warmup=0.2,level=layers"
RECIPES = [ONES, SPARSE, CACHING, "balanced", "fast"]
IDS = ["ones", "tiles", "whole", "balanced", "fast"]


@pytest.fixture
def flux():
    """A batch of one: the definitions are not quick."""
    torch.manual_seed(0)
    model, inputs = adapters()["FluxTransformer2DModel"].tiny()
    return model.eval(), first_item(inputs)


# The definitions read no value on the host, as those of a GPU do not; the `cpu` backends do.
plain_run = functools.partial(run, backend="reference")


def accelerate(model, recipe):
    engine = flashomni.accelerate(model, recipe, graphs=True, backend="reference")
    engine._runtime.graphs._recorder_for = lambda device: TapeRecorder()
    return engine


def replays(engine):
    return engine._runtime.graphs.replays


@pytest.mark.covering(1)
@pytest.mark.parametrize("recipe", [SPARSE, CACHING], ids=["tiles", "whole"])
def test_every_generation_is_the_same_bits(tiny, recipe):
    """Counted, recorded, replayed; and with another picture."""
    model, inputs = tiny
    check_generations(model, first_item(inputs), recipe, steps=6)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [ONES, "balanced", "fast"], ids=["ones", "balanced", "fast"])
def test_every_recipe_gives_the_same_bits(flux, recipe):
    """The recipes that decide more: one model stands for all."""
    check_generations(*flux, recipe)


def check_generations(model, inputs, recipe, steps=STEPS):
    other = {**inputs, "hidden_states": torch.randn_like(inputs["hidden_states"])}
    expected, summary = plain_run(model, inputs, recipe, steps)
    different, _ = plain_run(model, other, recipe, steps)
    assert {"update", "dispatch"} <= {step["kind"] for step in summary.steps}
    with accelerate(model, recipe) as engine:
        for _ in range(2):
            assert torch.equal(generation(engine, model, inputs, steps), expected)
        notes = [note for note in engine.report().notes if "CUDA graph" in note]
        if any("no CUDA graphs" in note for note in notes):
            pytest.skip(notes[-1])
        assert torch.equal(generation(engine, model, other, steps), different)
        before = replays(engine)
        assert torch.equal(generation(engine, model, inputs, steps), expected)
        assert replays(engine) - before == steps
        assert engine._runtime.graphs.recorder.pools <= 2  # or no memory is used again
        last = engine.report()
        for a, b in zip(last.steps, summary.steps, strict=True):
            assert {**a, "seconds": 0} == {**b, "seconds": 0}
        assert last.flops_executed == summary.flops_executed
    assert residue(model) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", [f"topk:q_density=.5,kv_density=.6,interval=3,warmup=.4,order={n}" for n in (0, 1)]
)
def test_a_plain_full_step_comes_again_behind_all_others(flux, recipe):
    """The recording of the first step is the last one's too: it leaves what others made alone."""
    check_generations(*flux, recipe)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES[1:], ids=IDS[1:])
def test_two_generations_in_turn_have_recordings_of_their_own(flux, recipe):
    model, inputs = flux
    other = {**inputs, "hidden_states": torch.randn_like(inputs["hidden_states"])}
    alone = [plain_run(model, each, recipe)[0] for each in (inputs, other)]
    with accelerate(model, recipe) as engine:
        for round_ in range(3):
            latents = [each["hidden_states"] for each in (inputs, other)]
            for step in range(STEPS):
                for index, each in enumerate((inputs, other)):
                    engine.step(step, STEPS, generation=f"{round_} {index}")
                    out = call(model, {**each, "hidden_states": latents[index]})
                    assert torch.equal(out, alone[index][step])
                    latents[index] = latents[index] - 0.05 * out
        assert replays(engine) >= 2 * 2 * STEPS
        assert len(engine._runtime.graphs._slots) == 2


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [SPARSE, "balanced"], ids=["tiles", "balanced"])
def test_branches_have_recordings_of_their_own(flux, recipe):
    model, inputs = flux
    text = inputs["encoder_hidden_states"]
    both = [inputs, {**inputs, "encoder_hidden_states": torch.randn_like(text)}]
    alone = [plain_run(model, each, recipe)[0] for each in both]
    with accelerate(model, recipe) as engine:
        for _ in range(3):
            latents = [inputs["hidden_states"]] * 2
            for step in range(STEPS):
                for index, each in enumerate(both):
                    engine.step(step, STEPS, branch="ab"[index])
                    out = call(model, {**each, "hidden_states": latents[index]})
                    assert torch.equal(out, alone[index][step])
                    latents[index] = latents[index] - 0.05 * out
        assert replays(engine) >= 2 * STEPS


@pytest.mark.slow
def test_a_generation_that_was_given_up_leaves_its_slot(flux):
    model, inputs = flux
    expected, _ = plain_run(model, inputs, SPARSE)
    with accelerate(model, SPARSE) as engine:
        for steps in (3, 7, STEPS, 4, STEPS, STEPS, 6, STEPS):
            outputs, latents = [], inputs["hidden_states"]
            for step in range(steps):
                engine.step(step, STEPS)
                outputs.append(call(model, {**inputs, "hidden_states": latents}))
                latents = latents - 0.05 * outputs[-1]
            assert torch.equal(torch.stack(outputs), expected[:steps])
        assert len(engine._runtime.graphs._slots) == 1 and replays(engine)


@pytest.mark.slow
def test_another_shape_and_number_of_steps(flux):
    """Come and go; none sees what was recorded for another."""
    model, inputs = flux
    small = {**inputs, "hidden_states": inputs["hidden_states"][:, :200],
             "img_ids": inputs["img_ids"][:200]}  # fmt: skip
    cases = [(inputs, STEPS), (small, STEPS), (inputs, 8)]
    expected = [plain_run(model, each, SPARSE, steps)[0] for each, steps in cases]
    with accelerate(model, SPARSE) as engine:
        for _ in range(3):
            for (each, steps), outputs in zip(cases, expected, strict=True):
                assert torch.equal(generation(engine, model, each, steps), outputs)
        assert replays(engine)


@pytest.mark.slow
def test_a_model_that_fails_in_between(flux):
    """The branch starts afresh; recordings of the generation are not used for what follows."""
    model, inputs = flux
    with accelerate(model, SPARSE) as engine:
        for _ in range(3):
            expected = generation(engine, model, inputs)
        for step in range(5):
            engine.step(step, STEPS)
            call(model, inputs)
        engine.step(5, STEPS)
        with pytest.raises(Exception):  # noqa: B017  # whatever a wrong shape raises
            call(model, {**inputs, "pooled_projections": inputs["pooled_projections"][:, :3]})
        engine.step(6, STEPS)
        assert call(model, inputs).isfinite().all()
        assert torch.equal(generation(engine, model, inputs), expected)


@pytest.mark.slow
def test_older_recordings_leave_newer_ones_alone(flux, monkeypatch):
    """Behind a call that failed a generation may come to a chain that was recorded before.

    It would write over the densities that the steps in front of it have left for the report.
    """
    model, inputs = flux
    recipe, real = "topk:q_density=.5,kv_density=.6,interval=3,warmup=.1,order=1", graphs.Graphs.run
    failing = set()

    def run_and_fail(self, call, *given):
        output = real(self, call, *given)
        if call.tick.step in failing:
            raise MemoryError
        return output

    monkeypatch.setattr(graphs.Graphs, "run", run_and_fail)

    def figures(engine, fails):
        failing.clear()
        failing.update(fails)
        for step in range(8):
            engine.step(step, 8)
            with contextlib.suppress(MemoryError):
                call(model, inputs)
        names = ("step", "kind", "q_density", "kv_density", "executed")
        return [[each[name] for name in names] for each in engine.report().steps]

    cases = [(1, 3), (1, 3), (), (), (3,)]
    with flashomni.accelerate(model, recipe, backend="reference") as engine:
        expected = {fails: figures(engine, fails) for fails in set(cases)}
    with accelerate(model, recipe) as engine:
        for fails in cases:
            assert figures(engine, fails) == expected[fails]
        assert replays(engine) > 20


@pytest.mark.slow
def test_weights_that_changed_in_place_are_read(flux):
    """And those that were replaced, hooked or put into training mode are noticed."""
    model, inputs = flux
    with accelerate(model, SPARSE) as engine:
        for _ in range(3):
            generation(engine, model, inputs)
        bias = model.proj_out.bias
        bias.add_(1.0)
        before = replays(engine)
        changed = generation(engine, model, inputs)
        assert replays(engine) > before
        model.proj_out.bias = torch.nn.Parameter(bias.clone())
        before = replays(engine)
        assert torch.equal(generation(engine, model, inputs), changed)
        assert replays(engine) - before < STEPS
        handle = model.proj_out.register_forward_hook(lambda *_: None)
        before = replays(engine)
        assert torch.equal(generation(engine, model, inputs), changed)
        assert replays(engine) == before
        assert any("proj_out carries a forward hook" in note for note in engine.report().notes)
        handle.remove()
    expected, _ = plain_run(model, inputs, SPARSE)
    assert torch.equal(changed, expected)


@pytest.mark.slow
def test_another_attention_of_the_process_is_another_recording(flux):
    """What stays diffusers' own runs by it: a recording has the kernels of its own time."""
    from diffusers.models.attention_dispatch import attention_backend

    model, inputs = flux
    with accelerate(model, ONES) as engine:
        for _ in range(3):
            generation(engine, model, inputs, 3)
        before = replays(engine)
        with attention_backend("_native_math"):
            generation(engine, model, inputs, 3)
        assert replays(engine) == before
        generation(engine, model, inputs, 3)
        assert replays(engine) > before


@pytest.mark.slow
def test_reset_and_remove_drop_all(flux):
    model, inputs = flux
    engine = accelerate(model, SPARSE)
    for _ in range(3):
        expected = generation(engine, model, inputs)
    assert any(note.endswith("MiB") for note in engine.report().notes)
    engine.reset()
    assert not engine._runtime.graphs._slots
    assert torch.equal(generation(engine, model, inputs), expected)
    engine.remove()
    assert not engine._runtime.graphs._slots and residue(model) == []


@pytest.mark.slow
def test_recipes_without_graphs_say_why(flux):
    """Histories on the host travel on a stream of their own."""
    model, inputs = flux
    recipe = SPARSE.replace(history_device="host")
    expected, _ = plain_run(model, inputs, recipe)
    with accelerate(model, recipe) as engine:
        for _ in range(3):
            assert torch.equal(generation(engine, model, inputs), expected)
        assert not replays(engine)
        note = "no CUDA graphs: histories are kept on the host"
        assert note in engine.report().notes


def test_without_a_gpu_the_report_says_so(flux):
    model, inputs = flux
    with flashomni.accelerate(model, SPARSE, graphs=True) as engine:
        assert generation(engine, model, inputs).isfinite().all()
        assert "no CUDA graphs: the model computes on cpu" in engine.report().notes
    with pytest.raises(ValueError, match="graphs must be"):
        flashomni.accelerate(model, SPARSE, graphs="yes")


@pytest.mark.parametrize(
    "does, why",
    [
        (lambda x: x.sum().item(), "reads a value"),
        (lambda x: x[x > 0], "reads a value"),
        (lambda x: torch.rand_like(x), "random"),
    ],
)
def test_what_cannot_repeat_is_refused_before_it_happens(does, why):
    with pytest.raises(Uncapturable, match=why), Watch(torch.device("cpu")):
        does(torch.ones(3))


@pytest.mark.slow
def test_a_model_that_reads_a_value_goes_on_without(flux):
    """Whichever call is tried next: what is left of an attempt is no use to it."""
    model, inputs = flux
    stock = type(model.proj_out).forward

    class Reads(type(model.proj_out)):
        def forward(self, x):
            float(x.sum())
            return stock(self, x)

    model.proj_out.__class__ = Reads
    expected, _ = plain_run(model, inputs, SPARSE)
    with accelerate(model, SPARSE) as engine:
        for _ in range(2):
            assert torch.equal(generation(engine, model, inputs), expected)
        assert any("reads a value back" in note for note in engine.report().notes)
        assert not replays(engine)


def test_what_is_read_is_held():
    ours = torch.ones(3)
    with Watch(torch.device("cpu")) as watch:
        (ours.view(3) + 1) * torch.zeros(3)
    assert [tensor.data_ptr() for tensor in watch.held.values()] == [ours.data_ptr()]


@pytest.mark.slow
def test_what_only_kernels_read_is_held(flux, monkeypatch):
    """No op of torch is given the progress of a step, but the kernels that choose read it."""
    model, inputs = flux
    real, read = LayerStep._site, []

    def site(*args):
        found = real(*args)
        if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:  # it is recorded
            read.append(weakref.ref(found.progress))
        return found

    monkeypatch.setattr(LayerStep, "_site", site)
    with accelerate(model, SPARSE) as engine:
        for _ in range(2):
            generation(engine, model, inputs)
        gc.collect()
        assert read and replays(engine)
        assert all(progress() is not None for progress in read)
        engine.reset()
        gc.collect()
        assert not any(progress() is not None for progress in read)


def test_a_mirror_shares_tensors_and_nothing_else(flux):
    model, inputs = flux
    with flashomni.accelerate(model, SPARSE) as engine:
        for step in range(6):
            engine.step(step, STEPS)
            call(model, inputs)
        (branch,) = engine._runtime.last.branches.values()
        copy = mirror(branch.layers)
        for one, two in zip(branch.layers, copy, strict=True):
            assert one is not two and one.history is not two.history
            assert one.symbols is two.symbols and one.history.times == two.history.times
            pairs = zip(one.history.terms(), two.history.terms(), strict=True)
            assert all(a is b for a, b in pairs)
            two.history.push(two.history.terms()[0], STEPS)
            assert one.history.times[-1] < STEPS


@pytest.mark.slow
def test_auto_leaves_large_blocks_alone(flux, monkeypatch):
    """Where the device is busy anyway, memory is worth more."""
    monkeypatch.setattr(graphs, "LARGE", 1e6)
    model, inputs = flux
    expected, _ = plain_run(model, inputs, SPARSE)
    with accelerate(model, SPARSE) as engine:
        engine._runtime.graphs.mode = "auto"
        for _ in range(3):
            assert torch.equal(generation(engine, model, inputs), expected)
        assert not replays(engine) and not engine._runtime.graphs._slots
        assert any("busy longer than the host" in note for note in engine.report().notes)
