"""``flashomni.compare``: any pipeline, paired differences, equal time; measures by path."""

import dataclasses
import itertools
import json
import math
import statistics

import pytest
import safetensors.torch
import torch
from pages import Page

import flashomni
from flashomni.cli.compare import usual_rivals
from flashomni.engine import Recipe
from flashomni.lab import zoo
from flashomni.lab.fidelity.compare_page import Shown, write_page
from flashomni.lab.fidelity.comparison import Comparison, Picture, Timed, mean_and_error
from flashomni.lab.fidelity.equal_time import at_equal_time
from flashomni.lab.fidelity.judged import CAP_DB
from flashomni.lab.fidelity.measures import _AlexNet, load_measures
from flashomni.lab.fidelity.methods import parse_method
from flashomni.lab.fidelity.peers import make_peer
from flashomni.lab.fidelity.result import Result
from flashomni.lab.fidelity.table import summarise

PROMPTS = ["a red circle", "a small blue square left of a ring", "a cat"]
CALL = {"height": 64, "width": 64, "guidance_scale": 3.5, "max_sequence_length": 64}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pipe():
    return zoo.random_pipeline("tiny-image", heads=2, head_dim=32, dual=1, single=1).pipe


def brightness(reference, pixels, prompt):
    """A measure of ours."""
    assert reference.shape == pixels.shape and prompt in PROMPTS
    return float(pixels.mean())


@pytest.mark.slow
def test_a_pipeline_object_is_compared(pipe):
    """Every method, prompt and seed; batches give what single pictures give; nothing stays on."""
    own = Recipe.of("fora", interval=3, name="mine")
    settings = {"call": CALL, "steps": 6, "rounds": 1}
    given = ["lossless", own, "steps=3", "easycache:first=2", "diffusers.mag:steps=[0,2,5]"]
    found = flashomni.compare(
        pipe, given, PROMPTS, batch=2, measures={"light": f"{__name__}:brightness"}, **settings
    )
    rows = {row.method: row for row in found.rows}
    assert list(rows) == ["lossless", "mine", *given[2:]] and len(found.pictures) == 5 * 3 * 2
    assert rows["lossless"].psnr_db > 60 > rows["mine"].worst_psnr_db
    assert (rows["mine"].computed, rows["steps=3"].computed) == (3, 3)
    assert {p.num_steps for p in found.pictures} == {6, 3} and not found.impossible
    assert rows["lossless"].computed == 6  # its Dispatch steps leave nothing out
    assert rows["mine"].flops_skipped > 0.2 and rows["steps=3"].flops_skipped == 0.5
    assert all(row.seconds > 0 and "light=0." in row.measures for row in found.rows)
    assert rows["mine"].attention_spent < 1 == rows["lossless"].attention_spent
    alone = flashomni.compare(pipe, [own, given[-1]], PROMPTS, **settings)
    for name in ("mine", given[-1]):
        both = [[p.psnr_db for p in each.pictures if p.method == name] for each in (found, alone)]
        assert both[0] == pytest.approx(both[1], abs=0.05), name
    assert flashomni.engine_of(pipe) is None and not pipe.transformer.is_cache_enabled


def test_the_page_of_a_comparison(tmp_path):
    """A slider with each method, of the first prompts; the tables; what was typed is no markup."""
    prompts = ["<b>a cat</b>", "a dog", "a bird", "a fish", "a fly"]
    methods = ["<i>mine</i>", "steps=3", "broken"]
    shown, pictures = Shown(len(methods)), []
    draw = torch.Generator().manual_seed(0)
    for number, method in enumerate(methods):
        for prompt in range(len(prompts)):
            for seed in (7, 8):
                dense, made = torch.rand(2, 1, 3, 16, 24, generator=draw)
                shown(method, prompt, seed, dense, made)
                db = None if method == "broken" else 40.0 - number
                pictures.append(Picture(method, prompt, seed, db, 0.9, None, 5, 0.5))
    times = [Timed(method, "recipes", 1.0, 2.0) for method in methods]
    found = Comparison.of(pictures, times, CPU, left_out=["late"], seconds=12.0)
    path = write_page(
        found, shown, tmp_path / "deep", model="tiny", prompts=prompts, rivals=["steps=3"],
        methods=methods[:1], command="flashomni compare ...", versions={"torch": "2"},
    )  # fmt: skip
    page = Page.of(path.read_text())
    page.check_self_contained()
    assert path.name == "compare.html" and page.tags["img"] == 3 * (1 + len(methods))
    assert page.text("h3") == prompts[:3] and page.text("option") == methods * 3
    assert page.text("h2") == ["Notes", "Pictures", "Methods", "At equal time", "To do it again"]
    assert page.text("th")[8:12] == ["stock pipeline", *methods]
    notes = page.text("li")
    assert "broken has no fidelity" in notes[0] and "no time for late" in notes[1]
    assert "+1.0" in path.read_text() and "not finite" in path.read_text()


def test_a_page_without_results_says_so(tmp_path):
    """And is written."""
    empty = Comparison.of([], [], CPU, left_out=["fora"])
    path = write_page(
        empty, Shown(1, prompts=0), tmp_path, model="tiny", prompts=["x"], rivals=[],
        methods=["fora"], command="flashomni compare fora", versions={},
    )  # fmt: skip
    page = Page.of(path.read_text())
    assert page.text("h2") == ["Notes", "At equal time", "To do it again"]
    assert "No rival is as fast as a method." in page.text("p")


def test_what_cannot_be_compared_is_refused_before_anything_runs(pipe):
    for methods, prompts, seeds in ([], PROMPTS, [0]), (["fora"], [], [0]), (["fora"], PROMPTS, []):
        with pytest.raises(ValueError, match="must not be empty"):
            flashomni.compare(pipe, methods, prompts, seeds=seeds)
    with pytest.raises(ValueError, match="methods must differ"):
        flashomni.compare(pipe, ["fora", "fora"], PROMPTS)


def test_methods_that_there_is_no_time_for_are_named(pipe):
    found = flashomni.compare(
        pipe, ["fora", "lossless"], PROMPTS[:1], seeds=[0], call=CALL, steps=2, seconds=0.0
    )
    assert found.left_out == ("fora", "lossless") and "no time: fora, lossless" in str(found)


def picture(method, prompt, seed, db):
    return Picture(method, prompt, seed, db, 0.9, None, 5, 0.5)


def test_errors_are_over_prompts_and_differences_are_paired():
    """Seeds of one prompt belong together; the rival is the best that is not slower."""
    values = {
        "ours": [[40, 42], [30, 33], [50, 51]],
        "fast peer": [[38, 39], [29, 30], [45, 49]],
        "slow peer": [[60, 60], [60, 60], [60, 60]],
        "bad peer": [[20, 20], [20, 20], [20, 20]],
    }
    pictures = [
        picture(name, prompt, seed, float(db))
        for name, rows in values.items()
        for prompt, row in enumerate(rows)
        for seed, db in enumerate(row)
    ]
    times = [
        Timed("ours", "recipes", 1.0, 2.0), Timed("fast peer", "peers", 1.02, 2.0),
        Timed("slow peer", "peers", 1.5, 2.0), Timed("bad peer", "peers", 0.5, 2.0),
    ]  # fmt: skip
    found = Comparison.of(pictures, times, CPU)
    row = found.rows[0]
    means = [41, 31.5, 50.5]
    assert row.psnr_db == pytest.approx(41.0) and row.worst_psnr_db == 30
    assert row.psnr_error == pytest.approx(statistics.stdev(means) / math.sqrt(3), abs=0.01)
    assert row.speedup == 2.0
    (rivalry,) = found.equal_time()
    gaps = [2.5, 2.0, 3.5]
    assert (rivalry.method, rivalry.rival) == ("ours", "fast peer")
    assert rivalry.gain_db == pytest.approx(statistics.fmean(gaps), abs=0.01)
    assert rivalry.error_db == pytest.approx(statistics.stdev(gaps) / math.sqrt(3), abs=0.01)
    assert rivalry.worst_db == 1
    assert found.equal_time(["slow peer"]) == []


def test_worsts_at_equal_time_are_of_the_same_pictures():
    """Ours was asked for one picture more, a hard one: it says nothing of who is better."""
    pictures = [picture("ours", 0, 0, 40.0), picture("ours", 1, 0, 10.0)]
    pictures.append(picture("steps=5", 0, 0, 30.0))
    times = [Timed("ours", "recipes", 1.0, 2.0), Timed("steps=5", "stock", 1.0, 2.0)]
    (found,) = at_equal_time(Comparison.of(pictures, times, CPU), ["ours"])
    assert (found.gain_db, found.worst_db, found.worst_psnr_db) == (10.0, 10.0, 10.0)


@pytest.mark.parametrize("theirs", [[(1, 0)], []])
def test_methods_without_a_shared_picture_are_not_compared(theirs):
    """The message names both, and how much there is of each."""
    pictures = [picture("ours", 0, 0, 40.0), *(picture("steps=5", *at, 30.0) for at in theirs)]
    times = [Timed("ours", "recipes", 1.0, 2.0), Timed("steps=5", "stock", 1.0, 2.0)]
    found = Comparison.of(pictures, times, CPU)
    if not theirs:  # no pictures, no row to compare with
        assert at_equal_time(found, ["ours"]) == found.equal_time() == []
        return
    with pytest.raises(ValueError, match="'ours' and of 'steps'; got 1 of the one and 1 of the"):
        at_equal_time(found, ["ours"])
    with pytest.raises(ValueError, match=r"'ours' and of 'steps=5'.* none shared"):
        found.equal_time()


@pytest.mark.slow
def test_pictures_in_turn_are_those_of_the_methods_and_timed(pipe):
    """Every picture is timed by the clock that is given; a limit ends behind a whole picture."""
    ticks = itertools.count()
    settings = {"call": CALL, "steps": 4, "seeds": [0]}
    given = ["fora:interval=2", "steps=2"]
    plain = flashomni.compare(pipe, given, PROMPTS[:2], rounds=0, **settings)
    found = flashomni.compare(
        pipe, given, PROMPTS[:2], in_turn=True, clock=lambda: float(next(ticks)), **settings
    )
    assert [(row.seconds, row.dense_seconds) for row in found.rows] == [(1.0, 1.0)] * 2
    assert next(ticks) == 2 * 2 * 3  # the clock was read twice for each of three, two pictures
    assert [row.psnr_db for row in found.rows] == [row.psnr_db for row in plain.rows]
    assert [row.computed for row in found.rows] == [3, 2]
    assert found.rows[1].flops_skipped == 0.5
    short = flashomni.compare(pipe, given, PROMPTS, in_turn=True, seconds=0.0, **settings)
    assert {row.prompts for row in short.rows} == {1} and not short.left_out
    assert {picture.seconds for picture in found.pictures} == {1.0}


def test_pictures_in_turn_are_of_one_prompt_on_one_pipeline(pipe):
    for wrong in ({"batch": 2}, {"pictures": False}):
        with pytest.raises(ValueError, match="in_turn must be left out"):
            flashomni.compare(pipe, ["fora"], PROMPTS, in_turn=True, **wrong)


def test_one_prompt_takes_its_seeds_and_one_picture_has_no_error():
    assert mean_and_error({0: [1.0, 3.0]}) == (2.0, pytest.approx(1.0))
    assert mean_and_error({0: [1.0]}) == (1.0, None)


def test_a_picture_that_is_not_finite_leaves_no_mean():
    pictures = [picture("a", 0, 0, None), picture("a", 1, 0, 40.0)]
    found = Comparison.of(pictures, [Timed("a", "recipes", 1.0, 1.0)], CPU)
    assert found.rows[0].psnr_db == "not finite" and found.equal_time() == []


@pytest.mark.parametrize("decibels", [[30.0, 50.0, 41.0, None], [120.0] * 4, [120.0, 30.0, 1, 2]])
def test_eval_and_compare_sum_up_alike(decibels):
    """Mean over seeds first, standard error over prompts, worst; identical pictures; failures."""
    places = [(0, 0), (0, 1), (1, 0), (2, 0)]  # prompts have not equally many seeds
    pictures = [picture("a", *at, db) for at, db in zip(places, decibels, strict=True)]
    (row,) = Comparison.of(pictures, [Timed("a", "recipes", 1.0, 2.0)], CPU).rows
    results = [
        Result(
            "a", "recipes", PROMPTS[p.prompt], p.seed, 5, 1.0, 2.0,
            None if p.psnr_db == CAP_DB else p.psnr_db, 0.9, None, None, None, None, 0.5,
            dict.fromkeys(("device", "commit", "torch", "diffusers"), ""),
            failure="not finite" if p.psnr_db is None else None,
        )
        for p in pictures
    ]  # fmt: skip
    _, other = summarise("m", results, "")
    figures = [(r.psnr_db, r.psnr_error, r.worst_psnr_db) for r in (row, other)]
    if set(decibels) == {CAP_DB}:
        assert figures == [(CAP_DB, 0.0, CAP_DB), ("identical", "", "identical")]
    else:
        assert figures[0] == figures[1]
    assert CAP_DB not in decibels[1:] or figures[0][0] == CAP_DB
    if decibels[1] == 30.0:
        assert figures[0][0] == pytest.approx((30.0 + 1 + 2) / 3)


def test_rows_go_into_a_csv_once(tmp_path):
    found = Comparison.of([picture("a", 0, 0, 40.0)], [Timed("a", "recipes", 1.0, 1.0)], CPU)
    for _ in range(2):
        found.save(tmp_path / "methods.csv", "tiny")
    lines = (tmp_path / "methods.csv").read_text().splitlines()
    assert len(lines) == 2 and lines[1].startswith("tiny,a,recipes,")


@pytest.mark.parametrize(
    ("figure", "value"),
    [
        ("attention_spent", 5.5e9), ("attention_spent", -0.01), ("attention_spent", math.nan),
        ("computed", 29), ("computed", -1), ("flops_skipped", 1.01), ("flops_skipped", -9e9),
    ],
)  # fmt: skip
def test_a_figure_that_cannot_be_is_named_and_not_saved(tmp_path, figure, value):
    """One picture of many spoils the row, whose mean might pass; the other rows are saved."""
    sound = {"computed": 28, "flops_skipped": 0.0, "attention_spent": 1.0, "num_steps": 28}
    pictures = [dataclasses.replace(picture("a", n, 1, 40.0), **sound) for n in range(48)]
    pictures += [dataclasses.replace(each, method="b") for each in pictures]
    pictures[7] = dataclasses.replace(pictures[7], **{figure: value})
    times = [Timed(name, "recipes", 1.0, 1.0) for name in "ab"]
    found = Comparison.of(pictures, times, CPU)
    assert list(found.impossible) == ["a"] and f"prompt 7, seed 1: {figure}" in str(found)
    found.save(tmp_path / "methods.csv", "tiny")
    rows = (tmp_path / "methods.csv").read_text().splitlines()[1:]
    assert len(rows) == 1 and rows[0].startswith("tiny,b,")
    assert Comparison.merged([found], found).impossible == found.impossible


@pytest.mark.parametrize("text", ["diffusers.mag:steps=[0,3,6]", "diffusers.mag:steps=[0]"])
def test_mag_computes_the_steps_it_is_given(pipe, text):
    """Its own rule, made to follow a list; counted at a block inside."""
    method, calls = parse_method(text), []
    method.prepare(pipe, 7, lambda: pytest.fail("nothing has to be learnt"))
    pipe.set_progress_bar_config(disable=True)
    block = pipe.transformer.single_transformer_blocks[0].attn
    handle = block.register_forward_pre_hook(lambda *_: calls.append(1))
    with method.attach(pipe, 7):
        pipe("a cat", **CALL, num_inference_steps=7, output_type="latent")
    handle.remove()
    assert len(calls) == len(json.loads(text.partition("=")[2]))


@pytest.mark.parametrize("steps", [[], [1, 2], [0, 2, 2], [0, "x"], 3, [0, True]])
def test_steps_of_a_peer_are_checked(steps):
    with pytest.raises(ValueError, match="steps must be ascending step numbers from 0"):
        make_peer(f"diffusers.mag:steps={json.dumps(steps).replace(' ', '')}")


@pytest.mark.parametrize("steps", [1, 4, 28, 50])
def test_the_usual_rivals_fit_any_number_of_steps(steps):
    names = usual_rivals(steps)
    assert len(set(names)) == len(names)
    for name in names:
        method = parse_method(name)
        assert method.steps is None or method.steps <= steps
    listed = json.loads(names[-1].partition("=")[2])
    assert listed[0] == 0 and listed[-1] == steps - 1


def test_lpips_by_path(tmp_path):
    """Zero of equal pictures, positive and symmetric otherwise; a wrong file is named."""
    torch.manual_seed(0)
    network = _AlexNet()
    for number in range(5):
        getattr(network, f"lin{number}").model[1].weight.data.abs_()
    weights = network.state_dict()
    weights["classifier.1.weight"] = torch.zeros(3)  # torchvision's file has more
    safetensors.torch.save_file(weights, tmp_path / "alex.safetensors")
    score = load_measures({"lpips": str(tmp_path / "alex.safetensors")}, CPU)["lpips"]
    a, b = torch.rand(2, 2, 3, 64, 64)
    assert score(a, a, "") == 0 and score(a, b, "") == pytest.approx(score(b, a, ""))
    assert score(a, b, "") > score(a, (a + 0.01).clamp(0, 1), "") > 0
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"lpips: .*other.safetensors does not hold its weights"):
        load_measures({"lpips": str(tmp_path / "other.safetensors")}, CPU)


def test_flip_takes_no_weights():
    pytest.importorskip("flip_evaluator")
    score = load_measures({"flip": ""}, CPU)["flip"]
    a, b = torch.rand(2, 1, 3, 32, 32)
    assert score(a, a, "") == 0 < score(a, b, "")


def test_clip_by_path(tmp_path):
    """A small random model of transformers, saved and found by its folder."""
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    words = [
        "<|startoftext|>",
        "<|endoftext|>",
        "a",
        "c",
        "t",
        "a</w>",
        "t</w>",
        "at</w>",
        "cat</w>",
    ]
    ids = {"vocab_size": len(words), "bos_token_id": 0, "eos_token_id": 1}
    text = {**small, **ids, "num_attention_heads": 2, "max_position_embeddings": 77}
    vision = {**small, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    CLIPModel(config).save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na t</w>\nc at</w>\n")
    score = load_measures({"clip": str(tmp_path)}, CPU)["clip"]
    pixels = torch.rand(1, 3, 40, 40)
    assert -100 <= score(pixels, pixels, "a cat") <= 100
    assert score(pixels, pixels, "a cat") != score(pixels, 1 - pixels, "a cat")


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"lpips": "nowhere"}, ValueError, "never downloaded; there is nothing at 'nowhere'"),
        ({"clip": "openai/clip"}, ValueError, "clip must be given by the path of its weights"),
        ({"image_reward": "x"}, NotImplementedError, "a pickle, which may run code"),
        ({"vbench": "x"}, NotImplementedError, "by address, not by path"),
        ({"mine": "nofunction"}, ValueError, "measure mine must be MODULE:FUNCTION"),
    ],
)
def test_measures_that_cannot_run_say_why(given, error, words):
    with pytest.raises(error, match=words):
        load_measures(given, CPU)
