"""What groups of layers add and what errors there do: by hand, on a small model."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flashomni.lab import zoo
from flashomni.models import find_adapter
from flashomni.tuning.cost import Costs
from flashomni.tuning.drive import Driver
from flashomni.tuning.gains import direct_effects
from flashomni.tuning.layer_groups import LayerGroups
from flashomni.tuning.layer_watch import Watch
from flashomni.tuning.record import record
from flashomni.tuning.state import State


@pytest.fixture(scope="module")
def driver():
    loaded = zoo.random_pipeline("tiny-image", heads=2, head_dim=32, dual=1, single=2)
    call = {**loaded.call, "height": 64, "width": 64, "num_inference_steps": 4}
    return Driver(loaded.pipe, call)


@pytest.fixture(scope="module")
def by_hand(driver):
    """Streams in front of and behind each block, by step; and the dense run."""
    streams = {site.name: ([], []) for site in find_adapter(driver.model).sites(driver.model)}
    handles = []
    steps = []
    for name, (before, after) in streams.items():
        block = driver.model.get_submodule(name)

        def enter(block, args, kwargs, before=before):
            before.append((kwargs["encoder_hidden_states"], kwargs["hidden_states"]))

        handles += [
            block.register_forward_pre_hook(enter, with_kwargs=True),
            block.register_forward_hook(lambda block, args, out, after=after: after.append(out)),
        ]
    driver.outline("a ring")  # which learns what the model returns
    for before, after in streams.values():
        before.clear(), after.clear()

    def see(step, call, compute):
        steps.append(step)
        return compute()

    recording = record(driver, "a ring", 0, see=see)
    for handle in handles:
        handle.remove()
    assert steps == [0, 1, 2, 3]
    return streams, recording


def added(streams, first, last):
    """``[T, numbers]``: what a run of blocks adds."""
    rows = []
    for step in range(4):
        both = zip(streams[first][0][step], streams[last][1][step], strict=True)
        rows.append(torch.cat([(b - a).flatten() for a, b in both]))
    return torch.stack(rows).double()


RUNS = (("transformer_blocks.0", "transformer_blocks.0"),
        ("single_transformer_blocks.0", "single_transformer_blocks.1"))  # fmt: skip


@pytest.mark.slow
def test_recordings_are_what_blocks_add(driver, by_hand, tmp_path):
    """Gram matrices of sums by hand; seen in the dense run or later; nothing is left behind."""
    streams, recording = by_hand
    groups = LayerGroups(driver, State(tmp_path, {}), 2, 4, 1, 1 << 30)
    assert groups.parts == ((0, 1), (1, 3)) and groups.lacks(0)
    found, spent = groups.record(0, "a ring", 0)
    assert torch.equal(found.latents, recording.latents) and spent > 0 and not groups.lacks(0)
    kept = np.array(groups._state.get(groups._name("gram 0")))
    power = float(recording.latents.double().square().sum())
    for mine, run in zip(kept, RUNS, strict=True):
        rows = added(streams, *run)
        np.testing.assert_allclose(mine, (rows @ rows.T / power).numpy(), rtol=1e-5)
    assert all(0 < share < 1 for share in groups.shares) and sum(groups.shares) < 1.0
    later = LayerGroups(driver, State(tmp_path / "later", {}), 2, 4, 1, 1 << 30)
    before = driver.computed
    later.see(0, recording)
    assert driver.computed - before == 4
    np.testing.assert_allclose(later._state.get(later._name("gram 0")), kept, rtol=1e-6)
    for name, block in driver.model.named_modules():
        assert not block._forward_hooks and not block._forward_pre_hooks, name
    assert not LayerGroups(driver, State(tmp_path, {}), 2, 4, 1, 1 << 30).lacks(0)


@pytest.mark.slow
def test_an_error_of_a_group_is_followed_to_the_output(driver, by_hand, tmp_path):
    """Of the step before, added in place of its own: the output's change, by that of the group."""
    streams, recording = by_hand
    groups = LayerGroups(driver, State(tmp_path, {}), 2, 4, 1, 1 << 30)
    groups.record(0, "a ring", 0)
    effects = direct_effects(driver, recording)
    before = driver.computed
    found = groups.reach(lambda: recording, effects, [1, 3])
    assert driver.computed - before == groups.probe_calls([1, 3]) == 2 + 4 and groups.reached
    for part, (first, last) in enumerate(RUNS):
        for step in (1, 3):
            change = added(streams, first, last)
            error = float((change[step - 1] - change[step]).norm())

            def reuse(block, args, out, step=step, first=first, last=last):
                after, before = streams[last][1][step - 1], streams[first][0][step - 1]
                now = streams[first][0][step]
                return tuple(n + (a - b) for n, a, b in zip(now, after, before, strict=True))

            handle = driver.model.get_submodule(last).register_forward_hook(reuse)
            outputs = []

            def answer(at, call, compute, step=step, outputs=outputs):
                outputs.extend([compute()] if at == step else [])
                return recording.outputs[at][call]

            driver.run("a ring", 0, answer)
            handle.remove()
            off = float((outputs[0] - recording.outputs[step][0]).double().norm())
            assert found[part][step] == pytest.approx(off / error, rel=1e-3)
    calm = Costs(np.ones((1, 4, 4)), effects.sum(1), np.stack([np.ones(4), np.zeros(4)]))
    asked = groups.costs(calm, lambda number: recording, 1, effects, [1, 3])
    assert asked[1].effects[1] == pytest.approx(effects[1, 0] * found[1][1])
    grams = np.eye(4)[None] * 2.0  # of an output that changes by 2 from step to step
    calm = Costs(grams, effects.sum(1), np.stack([np.ones(4), np.zeros(4)]))
    power = float(recording.latents.double().square().sum())
    off = [
        found[1][step] * float((added(streams, *RUNS[1])[[step - 1, step]].diff(dim=0)).norm())
        for step in (1, 3)
    ]
    wanted = np.sqrt(off[0] * off[1] / power) / 2
    assert groups.alone(calm)[1] == pytest.approx(wanted, rel=1e-4)
    again = groups.reach(lambda: 1 / 0, effects, [1, 3])  # was measured
    assert again == found


@pytest.mark.slow
def test_guidance_by_two_calls(driver, tmp_path):
    """Both are seen, each is held by itself, and their outputs count as guidance combines them."""
    guided = Driver(driver.pipe, {**driver.call, "true_cfg_scale": 4.0, "negative_prompt": "dark"})
    sums = []

    def see(block, args, kwargs, out):
        both = zip(out, (kwargs["encoder_hidden_states"], kwargs["hidden_states"]), strict=True)
        sums.append(sum(float((a - b).double().square().sum()) for a, b in both))

    groups = LayerGroups(guided, State(tmp_path, {}), 2, 4, guided.outline("a ring").calls, 1 << 30)
    handle = driver.model.transformer_blocks[0].register_forward_hook(see, with_kwargs=True)
    recording, _ = groups.record(0, "a ring", 0)
    handle.remove()
    assert recording.rows == 2 and len(sums) == 8
    gram = np.array(groups._state.get(groups._name("gram 0"))[0])
    power = float(recording.latents.double().square().sum())
    wanted = [(sums[2 * step] + sums[2 * step + 1]) / power for step in range(4)]
    np.testing.assert_allclose(gram.diagonal(), wanted, rtol=1e-4)
    effects = direct_effects(guided, recording)
    found = groups.reach(lambda: recording, effects, [2])
    one = [{**each} for each in found]
    assert all(each[2] > 0 for each in one)
    double = groups._measure(recording, effects * 2, [2])  # whose size is no part of it
    assert double[1][2] == pytest.approx(one[1][2])


def test_memory_is_bounded_and_said(tmp_path):
    """Numbers are drawn where there are too many, the same each time; few groups are refused."""
    watch = Watch([], (), torch.device("cpu"), 100)
    values = torch.randn(2, 3000, generator=torch.Generator().manual_seed(0))
    drawn = watch._drawn_of(values, 1000)
    assert drawn.shape == (1000,) and torch.equal(drawn, watch._drawn_of(values, 1000))
    assert float(drawn.square().sum()) == pytest.approx(float(values.square().sum()), rel=0.2)
    assert torch.equal(watch._drawn_of(values, 6000), values.flatten())
    model = SimpleNamespace()
    nobody = SimpleNamespace(model=model, pipe=None)
    unknown = LayerGroups(nobody, State(tmp_path, {}), 2, 4, 1, 0)
    assert unknown.parts == () and unknown.in_words == "" and not unknown.lacks(0)
    for count in (1, -2):
        with pytest.raises(ValueError, match=f"0 for none, or at least 2, got {count}"):
            LayerGroups(nobody, State(tmp_path, {}), count, 4, 1, 0)


@pytest.mark.slow
def test_memory_of_groups(driver, tmp_path):
    """As many numbers as there is room for; the message says how much is needed."""
    groups = LayerGroups(driver, State(tmp_path, {}), 2, 4, 2, 4 * 4 * 2 * 2000)
    assert groups.nbytes == 4 * 4 * 2 * 2000 and "at most 62.5 KiB more" in groups.in_words
    with groups.watch() as watch:
        record(driver, "a ring", 0, see=watch.see)
    kept = sum(x.nbytes for part in watch.added for step in part.values() for x in step)
    assert 0 < kept <= groups.nbytes
    with pytest.raises(ValueError, match="memory must leave 32768 bytes beside one recording"):
        LayerGroups(driver, State(tmp_path, {}), 2, 4, 1, 30000)
