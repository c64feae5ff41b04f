"""Whose call is it: pipelines that share a transformer, threads, requests in turn, branches."""

import logging
import threading

import pytest
import torch
from loops import CACHING, Loop, euler, kinds

import flashomni
from conftest import SPARSE, STEPS, call, generation, run
from flashomni.lab import zoo

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def small():
    pipe = zoo.random_pipeline("tiny-image", heads=2, head_dim=32, dual=1, single=1).pipe
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe, steps=8, seed=0, **more):
    size = {"height": 88, "width": 72, "max_sequence_length": 64, "output_type": "pt"}
    generator = torch.Generator().manual_seed(seed)
    return pipe("a ring", num_inference_steps=steps, generator=generator, **size, **more)[0]


@pytest.mark.parametrize("before", [4, 28])
def test_a_second_pipeline_has_a_count_of_its_own(small, before):
    """Image-to-image after text-to-image on the same transformer and scheduler."""
    from diffusers import FluxImg2ImgPipeline
    from PIL import Image

    other = FluxImg2ImgPipeline.from_pipe(small)
    other.set_progress_bar_config(disable=True)
    image = Image.new("RGB", (72, 88), "red")
    with flashomni.accelerate(other, SPARSE) as engine:
        alone = picture(other, steps=10, image=image, strength=0.6)
        expected = kinds(engine)
    with flashomni.accelerate(small, SPARSE) as engine:
        picture(small, steps=before)
        assert torch.equal(picture(other, steps=10, image=image, strength=0.6), alone)
        assert kinds(engine) == expected and "d" in expected and expected[-1] == "f"


def test_a_report_counts_the_generations_and_is_of_the_last(flux):
    """A pipeline may make several in one call; those that are not told of are not hidden."""
    model, inputs = flux
    with flashomni.accelerate(model, CACHING) as engine:
        for number in (1, 2, 1):
            generation(engine, model, inputs, steps=4)
            report = engine.report()
            assert (report.generation, len(report.steps)) == (number, 4)
            assert ("generation 2, the last one: " in str(report)) == (number == 2)
            if number == 2:
                engine.reset()


@pytest.mark.covering(1)
@pytest.mark.parametrize("recipe", [CACHING, SPARSE], ids=["whole", "tiles"])
def test_two_requests_in_turn_give_what_each_gives_alone(tiny, recipe):
    """Step by step on one transformer, each with caches of its own, bit for bit."""
    model, inputs = tiny
    other = {**inputs, "hidden_states": inputs["hidden_states"].flip(0)}
    alone = [run(model, each, recipe)[0] for each in (inputs, other)]
    with flashomni.accelerate(model, recipe) as engine:
        latents = [each["hidden_states"] for each in (inputs, other)]
        for step in range(STEPS):
            for index, each in enumerate((inputs, other)):
                engine.step(step, STEPS, generation=f"request {index}")
                out = call(model, {**each, "hidden_states": latents[index]})
                assert torch.equal(out, alone[index][step])
                latents[index] = latents[index] - 0.05 * out
            assert step == STEPS - 1 or len(engine._runtime.generations) == 2


def test_requests_that_are_staggered(flux):
    """a0 a1 b0 a2 b1 ...: neither loses its caches to the other."""
    model, inputs = flux
    alone, summary = run(model, inputs, CACHING)
    with flashomni.accelerate(model, CACHING) as engine:
        done = {"a": 0, "b": 0}
        for name in "aabababababababababab"[:20]:
            if done[name] == STEPS:
                continue
            engine.step(done[name], STEPS, generation=name)
            latents = inputs["hidden_states"]
            for earlier in alone[: done[name]]:
                latents = latents - 0.05 * earlier
            out = call(model, {**inputs, "hidden_states": latents})
            torch.testing.assert_close(out, alone[done[name]], atol=1e-4, rtol=1e-4)
            done[name] += 1
        dispatched = [s["kind"] for s in engine.report().steps].count("dispatch")
    assert dispatched >= [s["kind"] for s in summary.steps].count("dispatch") - 1


def test_threads_that_take_turns_work(flux):
    """Calls that do not overlap in time: each thread announces its own steps."""
    model, inputs = flux
    alone, _ = run(model, inputs, CACHING)
    lock, results = threading.Lock(), {}

    def work(name):
        outputs, latents = [], inputs["hidden_states"]
        for step in range(STEPS):
            with lock, torch.no_grad():
                engine.step(step, STEPS, generation=name)
                outputs.append(call(model, {**inputs, "hidden_states": latents}))
            latents = latents - 0.05 * outputs[-1]
        results[name] = torch.stack(outputs)

    with flashomni.accelerate(model, CACHING) as engine:
        threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert torch.equal(results["a"], alone) and torch.equal(results["b"], alone)


def test_an_overlapping_call_is_refused_and_the_other_stays_right(flux):
    """One clear sentence in the thread that comes second; the first generation keeps its bits."""
    model, inputs = flux
    alone, _ = run(model, inputs, CACHING)
    entered, leave, errors = threading.Event(), threading.Event(), []

    def hold(*_):
        if threading.current_thread() is not main and not entered.is_set():
            entered.set()
            leave.wait(20)

    main = threading.current_thread()
    outputs = []

    def work():
        with torch.no_grad():
            outputs.append(generation(engine, model, inputs))

    with flashomni.accelerate(model, CACHING) as engine:
        handle = model.x_embedder.register_forward_pre_hook(hold)
        thread = threading.Thread(target=work)
        thread.start()
        assert entered.wait(20)
        try:
            engine.step(0, STEPS, generation="second")
            call(model, inputs)
        except RuntimeError as error:
            errors.append(str(error))
        leave.set()
        thread.join()
        handle.remove()
    assert len(errors) == 1 and "overlap" in errors[0] and "lock" in errors[0]
    assert torch.equal(outputs[0], alone)


@pytest.mark.slow
def test_sixty_direct_calls_keep_nothing(flux, caplog):
    """Calls outside of any loop run dense; the log says so once."""
    model, inputs = flux
    stock = call(model, inputs)
    loop = Loop(model, euler(), inputs)
    with flashomni.accelerate(loop, CACHING) as engine, caplog.at_level(logging.WARNING):
        loop(8)
        for _ in range(60):
            assert torch.equal(call(model, inputs), stock)
        assert engine._runtime.last.nbytes() == (0, 0)
        assert all(g.finished for g in engine._runtime.generations)
    assert sum("outside of any denoising loop" in r.message for r in caplog.records) == 1


@pytest.mark.slow
def test_two_hundred_runs_of_one_step_keep_nothing(flux):
    """engine.step(0, 1) for each picture, unnamed or with a name of its own."""
    model, inputs = flux
    with flashomni.accelerate(model, CACHING) as engine:
        for index in range(200):
            engine.step(0, 1, generation=index if index % 2 else None)
            call(model, inputs)
        assert len(engine._runtime.generations) <= 8
        assert sum(sum(g.nbytes()) for g in engine._runtime.generations) == 0
        assert len(engine.report().steps) == 1


def test_generations_that_never_end_are_capped(flux, caplog):
    """The oldest loses its caches, the log says so, and its next step is an Update."""
    model, inputs = flux
    with flashomni.accelerate(model, CACHING) as engine, caplog.at_level(logging.WARNING):
        for name in range(12):
            for step in range(2):
                engine.step(step, STEPS, generation=name)
                call(model, inputs)
        assert len(engine._runtime.generations) == 8
        engine.step(2, STEPS, generation=0)
        call(model, inputs)
        assert kinds(engine) == "u"
    assert any("generations are under way" in record.message for record in caplog.records)


def test_a_run_that_was_stopped_in_its_first_step_leaves_nothing(flux):
    """The next one begins at the same step, with timesteps of its own."""

    class Stopped(Loop):
        def first(self, steps):
            self.scheduler.set_timesteps(steps)
            call(self.transformer, {key: x * 2 for key, x in self.inputs.items()})

    model, inputs = flux
    loop = Stopped(model, euler(), inputs)
    with flashomni.accelerate(loop, "taylorseer:interval=3,warmup=0"):
        alone = loop(8)
    with flashomni.accelerate(loop, "taylorseer:interval=3,warmup=0") as engine:
        loop.first(8)
        assert torch.equal(loop(8), alone)
        assert {step["branch"] for step in engine.report().steps} == {"call"}
        assert len(engine.report().steps) == 8


def test_a_warm_up_call_does_not_leak_into_the_run_behind_it(tiny):
    """A step 0 that is announced again starts a generation."""
    model, inputs = tiny
    for recipe in ("taylorseer:warmup=0", SPARSE):
        alone, _ = run(model, inputs, recipe)
        with flashomni.accelerate(model, recipe) as engine:
            engine.step(0, STEPS)
            call(model, {**inputs, "hidden_states": -inputs["hidden_states"]})
            assert torch.equal(generation(engine, model, inputs), alone)


def test_unnamed_branches_of_one_step_are_refused(flux):
    """Two announced calls of a later step without names would share one cache."""
    model, inputs = flux
    with flashomni.accelerate(model, CACHING) as engine:
        for step in (0, 1):
            engine.step(step, STEPS)
            call(model, inputs)
        engine.step(1, STEPS)
        with pytest.raises(ValueError, match=r"announced twice for branch 'call'.*branch="):
            call(model, inputs)


def test_a_branch_that_paused_is_updated(flux):
    """What it stored is older than the last step that was to be computed."""
    model, inputs = flux
    with flashomni.accelerate(model, "fora:interval=4,warmup=0.1") as engine:
        for step in range(20):
            engine.step(step, 20, "cond")
            call(model, inputs)
            if step < 7 or step >= 15:
                engine.step(step, 20, "uncond")
                call(model, inputs)
        late = [s["kind"] for s in engine.report().steps if s["branch"] == "uncond"][7:]
    assert late[0] == "update" and "dispatch" in late


def test_a_stream_that_changes_behind_the_same_arguments_is_an_update(flux):
    """A block gets other streams although the model was called alike: no old cache meets them."""
    model, inputs = flux
    longer = False

    def embed(module, args, output):
        return torch.cat([output, output[:, :5]], 1) if longer else output

    def positions(module, args, output):
        more = [torch.cat([table, table[:5]]) for table in output]
        return tuple(more) if longer else output

    handles = [
        model.x_embedder.register_forward_hook(embed),
        model.pos_embed.register_forward_hook(positions),
    ]
    with flashomni.accelerate(model, SPARSE) as engine:
        for step in range(STEPS):
            longer = step >= 4
            engine.step(step, STEPS)
            assert call(model, inputs).isfinite().all()
        found = kinds(engine)
    for handle in handles:
        handle.remove()
    _, summary = run(model, inputs, SPARSE)
    planned = "".join(step["kind"][0] for step in summary.steps)
    assert planned[4] == "d" and found[4] == "u" and found[5:] == planned[5:]


def test_a_pipeline_object_that_is_gone_keeps_nothing_alive(flux):
    """The engine holds pipelines weakly."""
    import gc
    import weakref

    model, inputs = flux
    with flashomni.accelerate(model, CACHING) as engine:
        loop = Loop(model, euler(), inputs)
        loop(6)
        seen = weakref.ref(loop)
        del loop
        gc.collect()
        assert seen() is None and engine.attached


@pytest.mark.slow
@pytest.mark.parametrize("leave", ["reset", "remove"])
@pytest.mark.parametrize(
    "recipe",
    [SPARSE, "taylorseer:level=output,interval=3", "adaptive_guidance"],
    ids=["tiles", "output", "guidance"],
)
def test_nothing_is_kept_of_a_generation_that_was_given_up(flux, recipe, leave):
    """Whoever holds the engine, which still reports: to try again there must be room."""
    model, inputs = flux
    engine = flashomni.accelerate(model, recipe)
    for step in range(5):
        for branch in ("cond", "uncond"):
            engine.step(step, STEPS, branch)
            call(model, inputs)
    assert engine._runtime.last.nbytes()[0] > 0
    getattr(engine, leave)()
    assert engine._runtime.last.nbytes() == (0, 0)
    assert len(engine.report().steps) == 10
    engine.remove()
