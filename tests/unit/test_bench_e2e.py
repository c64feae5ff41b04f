"""Whole generations at real size, tried on tiny models: rows, steps, restore. No timing."""

import csv
import math

import pytest
import torch
from typer.testing import CliRunner

import flashomni
from flashomni.cli import app
from flashomni.engine import Recipe, presets
from flashomni.lab.e2e import methods, models, parts, session, sparsity, stock
from flashomni.lab.e2e.run import generate

CPU = torch.device("cpu")
TINY = ["tiny-flux", "tiny-hunyuan"]
COLUMNS = (
    "model,tokens,recipe,density,step_kind,ms,generation_s,baseline,baseline_s,speedup,peak_gib,"
    "gpu,torch,triton,commit,command"
)
PLAN = methods.Plan(steps=9, stock_steps=2)


def run(*arguments):
    return CliRunner().invoke(app, ["bench", *(str(argument) for argument in arguments)])


def read(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module", params=TINY)
def model(request):
    return models.build(request.param, CPU, torch.float32)


def latents(model):
    call = {**model.call, "num_inference_steps": 4}
    return model.pipe(**call, generator=torch.Generator().manual_seed(0))[0]


@pytest.fixture
def eager_compiler(monkeypatch):
    """torch.compile without a C++ compiler behind it."""
    monkeypatch.setattr(stock, "COMPILE", {"fullgraph": True, "backend": "eager"})


# ---------------------------------------------------------------- models


def test_published_sizes():
    """Tokens of the three real models, and the heads and blocks of their transformers."""
    sizes = {name: models.MODELS[name].tokens for name in ("hunyuan-33k", "flux-1024", "flux-2048")}
    assert sizes == {"hunyuan-33k": 32_656, "flux-1024": 4_608, "flux-2048": 16_896}
    wan = models.MODELS["wan22"]
    assert wan.tokens == 75_600 and wan.config["num_attention_heads"] * 128 == 5120
    assert wan.note == "8 of the 40 blocks of each of the two transformers"
    for name, dual, single in (("hunyuan-33k", 20, 40), ("flux-1024", 19, 38)):
        config = models.MODELS[name].config
        assert (config["num_layers"], config["num_single_layers"]) == (dual, single)
        assert config["num_attention_heads"] * config["attention_head_dim"] == 3072


def test_tokens_are_those_of_the_call(model):
    """What the table says is what attention sees."""
    seen = []
    block = model.pipe.transformer.transformer_blocks[0]
    handle = block.register_forward_hook(
        lambda module, args, output: seen.append(sum(x.shape[1] for x in output))
    )
    latents(model)
    handle.remove()
    assert set(seen) == {model.tokens}


@pytest.mark.parametrize("name", TINY)
def test_bfloat16_is_built_as_such_and_repeats(name):
    """Every weight has the dtype asked for, the seed decides, the default dtype is untouched."""
    first, second = (models.build(name, CPU, torch.bfloat16, seed=3) for _ in range(2))
    weights = first.pipe.transformer.state_dict()
    assert {x.dtype for x in weights.values()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32
    assert all(torch.equal(x, second.pipe.transformer.state_dict()[k]) for k, x in weights.items())


def test_a_real_depth_stays_finite():
    """60 blocks of the published HunyuanVideo, but narrow: latents of order 1."""
    tiny = models.MODELS["tiny-hunyuan"]
    config = {**tiny.config, "num_layers": 20, "num_single_layers": 40}
    small = stock_size(tiny, config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "deep", small)
        deep = models.build("deep", CPU, torch.bfloat16, structure=4.0)
    call = {**deep.call, "num_inference_steps": 4}
    result = deep.pipe(**call, generator=torch.Generator().manual_seed(0))[0]
    assert result.isfinite().all() and 0.1 < result.float().std() < 10


def stock_size(size, config):
    return type(size)(size.family, config, size.text, size.valid, 64, 64, 5)


@pytest.mark.slow
def test_structure_makes_attention_uneven_layer_by_layer(model):
    """The first layer is as built; the last caches more tiles at the same threshold."""
    recipe = "flashomni:tau_q=.5,tau_kv=0,power=0,warmup=0,degrade_below=0,block_m=16,block_n=16"
    densities = {}
    for structure in (0.0, 2.0):
        built = models.build(model.name, CPU, torch.float32, structure=structure)
        with flashomni.accelerate(built.pipe, recipe) as engine:
            generate(built, 6, stop_after=2)
            update, dispatch = engine.report().steps
        assert (update["kind"], dispatch["kind"]) == ("update", "dispatch")
        densities[structure] = dispatch["q_density"]
    assert densities[0.0][0] == pytest.approx(densities[2.0][0], abs=0.02)
    assert densities[2.0][-1] < 0.9 * densities[0.0][-1]


# ---------------------------------------------------------------- methods


@pytest.mark.slow
def test_methods_leave_the_model_as_it_was(model, eager_compiler):
    """After stock, recipes, peers and compiled blocks, in turns: same latents, nothing left."""
    before = latents(model)
    baselines = stock.make_stocks(["eager", "compiled-native"])
    names = ["fast", "diffusers.taylorseer:cache_interval=3", "diffusers.pab"]
    wanted = dict(methods.parse_measure(name) for name in names)
    results = session.Session(model, baselines, wanted, PLAN).run()
    assert results.missing == {}
    assert list(results.methods) == names
    assert stock.leftovers(model.pipe.transformer) == []
    assert torch.equal(latents(model), before)
    assert all(len(timing.runs) == 2 for timing in results.baselines.values())


@pytest.mark.slow
def test_steps_that_are_run(model, monkeypatch):
    """Stock methods and lossless run a few steps; recipes and peers a complete generation."""
    counts = []
    real = methods.generate

    def counted(model, steps, *args, **kwargs):
        done = real(model, steps, *args, **kwargs)
        counts.append(len(done.calls))
        return done

    monkeypatch.setattr(methods, "generate", counted)
    timing = methods.time_stock(stock.Stock(), model, PLAN)
    assert counts == [1, PLAN.stock_steps] and len(timing.calls["full"]) == PLAN.stock_steps - 1
    assert timing.generation_s == PLAN.steps * timing.calls["full"][0]
    for name, last in (("topk", PLAN.steps), ("lossless", 7), ("diffusers.pab", PLAN.steps)):
        counts.clear()
        timing = methods.parse_measure(name)[1](model, PLAN, lambda step, steps: None)
        assert counts[-1] == last
        assert timing.estimated == (name == "lossless")
    counts.clear()
    whole = methods.Plan(steps=9, stock_steps=2, whole=True)
    assert not methods.time_recipe(Recipe.of("lossless"), model, whole).estimated
    assert counts[-1] == 9
    counts.clear()
    second = methods.Plan(steps=9, stock_steps=2, generation=2)
    timing = methods.time_recipe(Recipe.of("topk"), model, second)
    assert counts[-3:] == [9, 0, 0], "no hook in those of which the last counts"
    assert timing.generation_s != sum(map(sum, timing.calls.values())) and not timing.estimated


@pytest.mark.parametrize("name", [*presets(), "taylorseer", "topk:order=0"])
def test_the_short_run_has_every_kind(name):
    """Full, Update and Dispatch steps occur, with every forecast term at the first Update."""
    recipe = Recipe.of(name)
    brief, steps = methods.short(recipe)
    kinds = [kind.value for kind in brief.plan(steps).kinds]
    order = recipe.order
    assert kinds == ["full"] * order + ["update", "dispatch"] * 2 + ["full"]
    assert brief.policy == recipe.policy and brief.forecast == recipe.forecast


@pytest.mark.slow
def test_density_and_kinds_come_from_the_engine(model):
    """A share that was asked for is the share in the table; kinds are the schedule's."""
    recipe = Recipe.of("topk:q_density=1,kv_density=.5,interval=3,warmup=.1")
    timing = methods.time_recipe(recipe, model, PLAN)
    kinds = [kind.value for kind in recipe.plan(PLAN.steps).kinds]
    assert {k: len(v) for k, v in timing.calls.items()} == {k: kinds.count(k) for k in kinds}
    assert timing.densities["full"] == timing.densities["update"] == 1.0
    assert timing.densities["dispatch"] == pytest.approx(0.5, abs=0.05)
    assert timing.densities["dispatch"] < timing.densities["generation"] < 1


@pytest.mark.slow
def test_sparse_steps_and_refreshes_are_kinds_of_their_own(model):
    """Steps of one kind that compute different shares of the pairs are not one median."""
    name = "topk:q_density=1,kv_density=.25,interval=1,warmup=0,in_computed=true,dense_steps=2,"
    recipe = Recipe.of(name + "choose_at=[1],carry=extrapolate,refresh=3")
    timing = methods.time_recipe(recipe, model, methods.Plan(steps=8, stock_steps=4))
    expected = {"full": 1, "full, refresh": 3, "full, sparse": 4}
    assert {kind: len(calls) for kind, calls in timing.calls.items()} == expected
    assert timing.densities["full, refresh"] == 1 and timing.densities["full, sparse"] < 1


def test_the_first_call_counts_where_it_is_the_only_one_of_its_kind():
    kinds = ["update", "dispatch", "dispatch", "full"]
    assert methods.grouped(kinds, [9.0, 1.0, 2.0, 3.0], skip_first=True) == {
        "update": [9.0], "dispatch": [1.0, 2.0], "full": [3.0]
    }  # fmt: skip
    assert methods.grouped(["full", "full"], [9.0, 1.0], skip_first=True) == {"full": [1.0]}


def test_lossless_is_timed_over_so_few_steps_that_it_updates_once(model):
    plan = methods.Plan(steps=6, stock_steps=2)
    timing = methods.time_recipe(Recipe.of("lossless"), model, plan)
    assert timing.generation_s > 0 and set(timing.calls) == {"update", "dispatch", "full"}


def test_a_peer_is_split_into_slow_and_fast():
    """Halfway in ratio; not at all where steps differ little."""
    assert methods.slow_and_fast([1.0, 0.1, 0.9, 0.2]) == ["slow", "fast", "slow", "fast"]
    assert methods.slow_and_fast([1.0, 1.1]) == ["step", "step"]


@pytest.mark.slow
def test_what_cannot_run_does_not_cost_the_rest(model):
    """It is named with its reason; without any baseline there is nothing to compare with."""
    baselines = {"eager": stock.Stock(), "nonsense": stock.Stock("_flash_3")}
    results = session.Session(model, baselines, {}, PLAN).run()
    assert list(results.baselines) == ["eager"] and "Flash" in results.missing["nonsense"]
    with pytest.raises(RuntimeError, match="no baseline could be measured"):
        session.Session(model, {"nonsense": stock.Stock("_flash_3")}, {}, PLAN).run()


def test_latents_that_are_not_finite_are_refused(model):
    """A speed of NaNs is none."""
    block = model.pipe.transformer.transformer_blocks[0]
    handle = block.register_forward_hook(lambda module, args, out: tuple(x * math.nan for x in out))
    with pytest.raises(RuntimeError, match="not finite"):
        generate(model, 2)
    handle.remove()


# ---------------------------------------------------------------- command line


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_e2e_writes_rows(name, tmp_path):
    """A row for each kind of step and for the generation, of each method, against each baseline."""
    path, plot = tmp_path / "e2e.csv", tmp_path / "plots" / "e2e.png"
    arguments = ("e2e", "--model", name, "--recipe", "fora", "--recipe", "diffusers.pab",
                 "--steps", 8, "--stock-steps", 2, "--device", "cpu", "--csv", path)  # fmt: skip
    done = run(*arguments, "--plot", plot)
    assert done.exit_code == 0, done.output
    assert path.read_text().splitlines()[0] == COLUMNS and plot.stat().st_size > 0
    rows = read(path)
    assert list(dict.fromkeys(row["recipe"] for row in rows)) == ["eager", "fora", "diffusers.pab"]
    kinds = {row["step_kind"] for row in rows if row["recipe"] == "fora"}
    assert kinds == {"full", "update", "dispatch", "generation"}
    for row in rows:
        ratio = float(row["baseline_s"]) / float(row["generation_s"])
        assert row["baseline"] == "eager" and float(row["speedup"]) == pytest.approx(ratio, rel=0.1)
        assert row["peak_gib"] == "" and int(row["tokens"]) == models.MODELS[name].tokens
    again = run(*arguments)
    assert again.exit_code == 0, again.output
    assert len(read(path)) >= 2 * len(rows) - 2


@pytest.mark.slow
def test_profile_writes_parts(tmp_path):
    """One step of each kind, by part; the picture is drawn from the file."""
    path, plot = tmp_path / "parts.csv", tmp_path / "parts.png"
    done = run("e2e", "--model", "tiny-flux", "--recipe", "topk", "--profile", "--device", "cpu",
               "--csv", path, "--plot", plot)  # fmt: skip
    assert done.exit_code == 0, done.output
    rows = read(path)
    assert list(rows[0])[:5] == ["model", "method", "step_kind", "part", "ms"]
    bars = {(row["method"], row["step_kind"]) for row in rows}
    assert bars == {("eager", "full"), *(("topk", k) for k in ("full", "update", "dispatch"))}
    assert {row["part"] for row in rows} <= set(parts.PARTS) and plot.stat().st_size > 0


@pytest.mark.slow
def test_sparsity_writes_points(tmp_path):
    """A row for each mode and point, with the density that came of it."""
    path, plot = tmp_path / "sparsity.csv", tmp_path / "sparsity.png"
    done = run("sparsity", "--model", "tiny-hunyuan", "--point", ".5", "--device", "cpu",
               "--dispatch-steps", 2, "--csv", path, "--plot", plot)  # fmt: skip
    assert done.exit_code == 0, done.output
    rows = read(path)
    assert [row["mode"] for row in rows] == ["FC", "BSS", "both"] and plot.stat().st_size > 0
    assert all(0 < float(row["density"]) <= 1 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("e2e", "--model", "hunyuan-1"), "model must be one of hunyuan-33k, flux-1024"),
        (("e2e", "--recipe", "ludicrous"), "recipe must be a preset"),
        (("e2e", "--recipe", "diffusers.pab", "--profile"), "recipe must be a preset"),
        (("e2e", "--baseline", "abacus"), "baseline must be one of eager, cudnn, compiled"),
        (("e2e", "--steps", "2"), "steps must be at least 4"),
        (("e2e", "--stock-steps", "1"), "stock-steps must be from 2 to steps"),
        (("e2e", "--structure", "-1"), "structure must be at least 0"),
        (("e2e", "--plot", "x.png"), "plot needs csv"),
        (("e2e", "--csv", "CSV"), "has other columns"),
        (("sparsity", "--model", "hunyuan-1"), "model must be one of hunyuan-33k"),
        (("sparsity", "--mode", "all"), "mode must be one of FC, BSS, both"),
        (("sparsity", "--point", "1"), "point must be from 0 to below 1"),
        (("sparsity", "--dispatch-steps", "0"), "dispatch-steps must be at least 1"),
    ],
)
def test_mistakes_end_in_one_sentence(arguments, message, tmp_path):
    """Exit code 2 and what is allowed, before anything runs."""
    other = tmp_path / "other.csv"
    other.write_text("other,columns\n")
    done = run(*(str(other) if word == "CSV" else word for word in arguments))
    assert done.exit_code == 2, done.output
    assert message in done.output.replace("\n", " ") and "Traceback" not in done.output


# ---------------------------------------------------------------- sparsity


@pytest.mark.parametrize("mode", sparsity.MODES)
def test_a_point_is_one_update_and_dispatch_steps(mode):
    """The schedule has one full step that records, one Update, and the Dispatch steps."""
    point = sparsity.point_for(mode, 0.75, 3)
    kinds = [kind.value for kind in point.recipe.plan(point.steps).kinds]
    assert kinds == ["full", "update", "dispatch", "dispatch", "dispatch", "full"]
    policy = point.recipe.policy
    assert policy.q_density * policy.kv_density == pytest.approx(0.25)
