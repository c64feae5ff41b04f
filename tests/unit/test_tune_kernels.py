"""Tuning kernels: what is chosen, what may not be, what is kept, and what counts afterwards."""

import importlib
import json
import logging
import math

import pytest
import torch
from typer.testing import CliRunner

import flashomni.kernels
from flashomni.cli import app
from flashomni.kernels.common import configs, tuned
from flashomni.kernels.common.configs import Config
from flashomni.lab import doctor
from flashomni.lab.ops import tiles, tiles_bench
from flashomni.lab.ops.tiles import Keeper, Task, candidates, tasks, tune

BIG = 227 << 10
ATTENTION = Task("attention", 128, 2)
SHIPPED = Config(64, 64, 128, 4, 2)  # one of the candidates


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class FakeBench:
    """Milliseconds by configuration; each candidate takes a second to compile."""

    def __init__(self, clock, ms=None, wrong=(), refused=(), default=(2.0, 1.0)):
        self.clock, self.ms, self.default = clock, ms or {}, default
        self.bad, self.unfit, self.timed = wrong, refused, []

    def shipped(self, task):
        return SHIPPED

    def wrong(self, task, config):
        self.clock.now += 1
        return "its error is 1" if config in self.bad else None

    def refused(self, task, config):
        return "with a summary it does not run" if config in self.unfit else None

    def times(self, task, configs):
        self.timed.append(list(configs))
        found = [self.ms.get(config, self.default) for config in configs]
        return [x.pop(0) if isinstance(x, list) else x for x in found]


def choose(ms=None, **options):
    clock, lines = Clock(), []
    bench = FakeBench(clock, ms, **options)
    [found] = tune([ATTENTION], bench, BIG, clock=clock, tell=lines.append)
    return found, lines, bench


FAST, OTHER = (config for config in candidates(ATTENTION, BIG)[:2])


def test_the_fastest_is_chosen_and_measured_again():
    """Of many candidates one is always lucky: it meets the shipped one alone."""
    found, lines, bench = choose({FAST: (1.0, 0.5), OTHER: (1.5, 0.8)})
    assert (found.config, found.gain, lines) == (FAST, 2.0, [])
    assert bench.timed[0][0] == SHIPPED and bench.timed[1] == [SHIPPED, FAST]
    assert found.tried == len(candidates(ATTENTION, BIG))
    lucky, _, _ = choose({FAST: [(1.0, 0.5), (2.0, 1.0)]})
    assert (lucky.config, lucky.gain) == (SHIPPED, 1.0)


@pytest.mark.parametrize(
    ("ms", "chosen"),
    [
        ((1.97, 0.99), SHIPPED),  # within 2 %
        ((1.95, 0.975), FAST),
        ((1.0, 1.1), SHIPPED),  # slower at one density
        ((2.01, 0.8), FAST),
    ],
)
def test_two_percent_at_all_densities_together_and_none_slower(ms, chosen):
    """The shipped one stays where the gain is noise or is paid for at another density."""
    assert choose({FAST: ms})[0].config == chosen


def test_what_is_wrong_or_unfit_is_never_chosen():
    """However fast it is; a line says why."""
    found, lines, bench = choose({FAST: (0.1, 0.1), OTHER: (1.0, 0.5)}, wrong=[FAST])
    assert found.config == OTHER and all(FAST not in timed for timed in bench.timed)
    assert lines == ["attention 128 128x64x128 warps 8 stages 2: left out, its error is 1"]
    found, lines, _ = choose({FAST: (1.0, 0.5)}, refused=[FAST])
    assert found.config == SHIPPED and "fastest, but with a summary it does not" in lines[0]
    found, _, _ = choose({FAST: (3.0, 3.0)}, wrong=[SHIPPED], default=(4.0, 4.0))
    assert (found.config, found.gain) == (FAST, 1.0)  # there is nothing to compare with
    found, _, bench = choose(wrong=[SHIPPED, *candidates(ATTENTION, BIG)])
    assert found.config is None and not bench.timed


def test_time_ends_it_between_candidates_and_says_what_was_not_reached():
    """The most important tasks are first; what was half tried is chosen from, and told."""
    clock, lines, seen = Clock(), [], []
    wanted = tasks(2)
    assert [str(task) for task in wanted[:4]] == [
        "attention 128", "attention 64", "gemm_q 128", "gemm_q 64",
    ]  # fmt: skip
    bench = FakeBench(clock, {FAST: (1.0, 0.5)})
    found = list(
        tune(wanted, bench, BIG, seconds=12, clock=clock, tell=lines.append,
             on_progress=lambda done, total, what: seen.append((done, total, what)))
    )  # fmt: skip
    assert [str(x.task) for x in found] == ["attention 128", "attention 64"]
    assert clock.now == 12 and found[0].config == FAST
    assert lines[0] == "attention 64: the time is up, 3 of its candidates were tried"
    assert lines[1].startswith("the time is up; not tuned: gemm_q 128, gemm_q 64, gemm_o 128")
    done, totals = [s[0] for s in seen], {s[1] for s in seen}
    assert done == sorted(done) and len(totals) == 1 and done[-1] < totals.pop()


@pytest.mark.parametrize("task", tasks(2) + tasks(4, [16, 32]), ids=str)
def test_candidates_are_few_fit_and_are_tiles(task):
    """A card with 99 KB gets fewer of them, and some."""
    many, few = candidates(task, BIG), candidates(task, 99 << 10)
    assert set(few) <= set(many) and 1 <= len(few) <= len(many) <= 8
    for config in many:
        tuned._check(config)
        assert tiles.buffers(task, config) <= BIG and tiles._sums(task, config) <= 128
        assert task.op != "gemm_q" or config.tile_n == task.head_dim


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A card without tables of its own, and an empty cache folder."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Nothing 1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    monkeypatch.setenv("FLASHOMNI_CACHE", str(tmp_path))
    forgetting()
    yield torch.device("cuda", 0)
    forgetting()


def forgetting():
    from flashomni.kernels.attention import _measured

    tuned.forget()
    configs.places.cache_clear()
    _measured.entries.cache_clear()


def found_of(task, config, gain=1.2):
    return tiles.Found(task, SHIPPED, config, gain, 3)


def test_what_is_kept_comes_before_the_shipped_tables(card):
    """Each entry for itself, at once; a later choice of the shipped one takes it back."""
    untuned = tuned.tiles("attention/portable", card, 128, 2)
    assert untuned == configs.tiles("attention/portable", ("default",), 128, 2)
    assert doctor.tables(card).startswith("untuned: chosen on an H200; ")
    keeper = Keeper("NVIDIA Nothing 1", "abc")
    keeper.keep(found_of(ATTENTION, FAST))
    keeper.keep(found_of(Task("gemm_o", 64, 2), SHIPPED, 1.0))
    assert tuned.tiles("attention/portable", card, 128, 2) == FAST
    assert tuned.tiles("attention/portable", card, 64, 2) == configs.tiles(
        "attention/portable", ("default",), 64, 2
    )
    written = json.loads(keeper.path.read_text())
    assert (written["commit"], written["card"]) == ("abc", "NVIDIA Nothing 1")
    assert doctor.tables(card).startswith(f"tuned here on {written['when']}: 1 of 2 changed; ")
    keeper.keep(found_of(ATTENTION, SHIPPED, 1.0))
    assert tuned.tiles("attention/portable", card, 128, 2) == untuned


def test_stopping_keeps_what_was_chosen(card):
    """Ctrl-C in the second task: the first one is in the file, whole."""
    keeper, clock = Keeper("NVIDIA Nothing 1", ""), Clock()
    bench = FakeBench(clock, {FAST: (1.0, 0.5)})
    right = bench.wrong

    def stopping(task, config):
        if task.head_dim == 64:
            raise KeyboardInterrupt
        return right(task, config)

    bench.wrong = stopping
    with pytest.raises(KeyboardInterrupt):
        for found in tune(tasks(2), bench, BIG, clock=clock):
            keeper.keep(found)
    assert tuned.tiles("attention/portable", card, 128, 2) == FAST
    assert [path.name for path in keeper.path.parent.iterdir()] == [keeper.path.name]


def test_other_versions_and_damaged_files_do_not_count_and_say_so(card, caplog):
    """One sentence, once; the next choice replaces the file."""
    keeper = Keeper("NVIDIA Nothing 1", "")
    keeper.keep(found_of(ATTENTION, FAST))
    whole = json.loads(keeper.path.read_text())
    made = whole["made with"]
    bad = {ATTENTION.table: {ATTENTION.key: {**FAST._asdict(), "tile_m": 48}}}
    texts = {
        "made with triton 1.0, here it is": whole | {"made with": made | {"triton": "1.0"}},
        "made with kernels None": whole | {"made with": {"triton": made["triton"]}},
        "tile_m must be a power of two from 16": whole | {"tables": bad},
        "cannot be used: KeyError": {"made with": made},
        "cannot be used: TypeError": [],
    }
    for told, content in texts.items():
        keeper.path.write_text(json.dumps(content))
        tuned.forget()
        caplog.clear()
        with caplog.at_level(logging.WARNING, "flashomni"):
            for _ in range(2):
                tuned.tiles.cache_clear()
                assert tuned.tiles("attention/portable", card, 128, 2) == configs.tiles(
                    "attention/portable", ("default",), 128, 2
                )
        assert len(caplog.messages) == 1 and told in caplog.text, caplog.text
        assert told in doctor.tables(card) and told in Keeper("NVIDIA Nothing 1", "").ignored
    keeper.keep(found_of(ATTENTION, OTHER))
    assert tuned.tiles("attention/portable", card, 128, 2) == OTHER


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(card, monkeypatch, tmp_path):
    """Three minutes would be lost."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLASHOMNI_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="the file of tuned kernels must be"):
        Keeper("NVIDIA Nothing 1", "")


def test_the_command_keeps_and_shows_each_choice(card, monkeypatch, capsys):
    """Half the tasks in the time; where the kernels cannot run it says why, and does nothing."""
    command = importlib.import_module("flashomni.cli.tune_kernels")
    monkeypatch.setattr(flashomni.kernels, "refusals", lambda op: {"portable": "no Triton"})
    with pytest.raises(NotImplementedError, match="cannot be tuned: no Triton"):
        command._tiles(card, torch.bfloat16, None, 60.0)
    assert not tuned.file_of("NVIDIA Nothing 1").exists()
    bench = FakeBench(Clock(), {FAST: (1.0, 0.5)}, wrong=[OTHER])
    monkeypatch.setattr(flashomni.kernels, "refusals", lambda op: {})
    monkeypatch.setattr(tiles_bench, "GpuBench", lambda device, dtype: bench)
    monkeypatch.setattr(tiles_bench, "shared_memory", lambda device: BIG)
    command._tiles(card, torch.bfloat16, [80, 96], 60.0)
    told = " ".join(capsys.readouterr().out.split())
    assert "attention 128 128x64x128 warps 8 stages 3: left out, its error is 1" in told
    assert "2.00x" in told and "shipped" in told
    written = json.loads(tuned.file_of("NVIDIA Nothing 1").read_text())
    assert written["tables"]["attention/portable"] == {ATTENTION.key: FAST._asdict()}
    assert set(written["tried"]) == {f"{op}/portable" for op in tiles.OPS}


def test_a_processor_gets_one_sentence():
    """There is nothing to choose from."""
    done = CliRunner().invoke(app, ["tune-kernels", "--device", "cpu"])
    assert done.exit_code and "chooses between kernels of a GPU, got device cpu" in " ".join(
        done.output.split()
    )


@pytest.fixture
def small(monkeypatch):
    """A bench of little work on a processor."""
    pytest.importorskip("triton", reason="needs Triton")
    monkeypatch.setattr(tiles_bench, "WIDTH", 32)
    monkeypatch.setattr(tiles_bench, "CHECKED", 150)
    return tiles_bench.GpuBench(torch.device("cpu"), torch.float32)


TINY = Config(32, 32, 16, 4, 2)


@pytest.mark.parametrize("op", tiles.OPS)
def test_results_are_held_to_twice_torchs_error(op, small, monkeypatch):
    """In any element; NaN, what was not written and what was too much are wrong."""
    monkeypatch.setattr(tiles_bench, "summarise", lambda *args: None)
    task = Task(op, 16, 4)
    problem = tiles_bench.problem(task, 150, 0.6, small.device, small.dtype, 0)
    bound = tiles_bench.Bound.of(problem, small.dtype)
    good = torch.where(problem.written, problem.define(torch.float32), tiles_bench.POISON)
    at = tuple(problem.written.nonzero()[-1])

    def told(place, value):
        problem.out.copy_(good)
        if place is not None:
            problem.out[place] = value
        return bound.broken_by(problem)

    assert told(None, 0) is None
    for value in (good[at] + 1e-3, math.nan, tiles_bench.POISON):
        assert "its error is" in told(at, value)
    if op == "gemm_q":
        cached = tuple((~problem.written).nonzero()[0])
        assert told(cached, 0.0) == "it writes tiles that are cached"


def test_what_does_not_run_is_skipped_with_its_first_line(small, monkeypatch):
    """Out of resources, or a pass of the compiler that fails."""
    from flashomni.kernels.attention import portable

    def launch(call, config):
        raise RuntimeError("out of resource: shared memory\nmore")

    monkeypatch.setattr(tiles_bench, "summarise", lambda *args: None)
    monkeypatch.setattr(portable, "launch", launch)
    task = Task("attention", 16, 4)
    assert small.wrong(task, TINY) == "it does not run: out of resource: shared memory"
    assert small.refused(task, TINY).startswith("without symbols it does not run: out of")


@pytest.mark.triton
@pytest.mark.parametrize("op", tiles.OPS)
def test_the_portable_kernels_pass_their_check(op, small):
    """With TRITON_INTERPRET=1, the other calls of the op as well."""
    from flashomni.kernels.common import portable

    if not portable.INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1")
    task = Task(op, 16, 4)
    config = TINY if op != "gemm_q" else TINY._replace(tile_k=32, tile_n=16)
    assert small.wrong(task, config) is None
    assert small.refused(task, config) is None
