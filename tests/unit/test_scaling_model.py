"""What tools/scaling_model.py computes for more cards follows from the two that were measured."""

import importlib.util
import shlex
import sys
from pathlib import Path

import pytest

from flashomni.lab import results
from flashomni.lab.e2e.methods import GENERATION
from flashomni.lab.e2e.table import GenerationRow

ROOT = Path(__file__).resolve().parents[2]
MODEL = "hunyuan-33k"
EXCHANGE = {MODEL: 0.8}
STOCK = "diffusers native (our plan on stock blocks), 2 cards"
RECIPES = {"lossless": (2.5, 1.0), "balanced": (0.8, 0.4), "cached": (0.0, 0.0), "fora": (2.5, 1.0)}
LAYERS, SIZE = 60, 32656 * 3072 * 2


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("scaling_model", ROOT / "tools/scaling_model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling_model"] = module
    spec.loader.exec_module(module)
    return module


def step_on(cards, rest, shared, attentions):
    """Seconds, by the sum of the page written out again."""
    bandwidth = SIZE / 4 / 0.8e-3
    sent = (4 * attentions / cards + 1) * SIZE * (cards - 1) / cards
    return rest + shared / cards + (sent / bandwidth if cards > 1 else 0)


def row(recipe, kind, seconds, density, baseline="eager"):
    about = dict(gpu="NVIDIA H100", torch="2.13.0", triton="3.6.0", commit="abc1234")
    return results.cells(GenerationRow(
        MODEL, 32656, recipe, density, kind, seconds * 1e3, 50 * seconds, baseline, 100.0,
        100.0 / (50 * seconds), 30.0, **about,
        command=f"torchrun --nproc-per-node 2 -m flashomni bench e2e --model {MODEL} --ulysses 2",
    ))  # fmt: skip


def rows(rest=0.05):
    found = []
    for baseline in ("eager", STOCK):
        found.append(row("eager", GENERATION, 3.2, 1.0, baseline))
        found.append(row(STOCK, GENERATION, 1.8, 1.0, baseline))
        for recipe, (shared, density) in RECIPES.items():
            for cards, name in ((1, recipe), (2, f"{recipe}, 2 cards")):
                if name != "fora":  # not measured on one card
                    seconds = step_on(cards, rest, shared, LAYERS * density)
                    found.append(row(name, "dispatch", 9.0, density, baseline))
                    found.append(row(name, GENERATION, seconds, density, baseline))
    return found


def test_a_step_that_scales_as_assumed_is_found_again(tool):
    """On 4 and 8 cards, from its mean times on 1 and 2, whatever is computed in it."""
    steps = tool.steps_of(rows(), EXCHANGE)
    assert set(steps) == {(MODEL, "lossless"), (MODEL, "balanced"), (MODEL, "cached")}
    for (_, recipe), step in steps.items():
        shared, density = RECIPES[recipe]
        assert step.rest == pytest.approx(0.05, rel=1e-3)
        for cards in (2, 4, 8):
            expected = step_on(cards, 0.05, shared, LAYERS * density)
            assert step.on(cards) == pytest.approx(expected, rel=1e-3)


def test_two_cards_of_the_table_are_as_measured(tool):
    """Also where two cards were more than twice as fast: then nothing is left to be a rest."""
    step = tool.Step(one=2.0, two=0.9, attentions=60, size=2e8, bandwidth=1e11)
    assert step.rest == 0.0 and step.on(2) == pytest.approx(0.9)
    assert step.on(8) < step.on(4) < 0.9


def test_the_bytes_are_those_of_the_page(tool):
    """docs/scaling.md: 201 MB an attention at HunyuanVideo's 33K on two cards."""
    step = tool.steps_of(rows(), EXCHANGE)[MODEL, "lossless"]
    assert (step.sent(2) - step.size / 2) / LAYERS == pytest.approx(201e6, rel=0.005)
    page = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    assert "sends 201 MB an attention" in page


def test_the_section_says_what_is_computed(tool):
    """All that ran on two cards is in the first table, what also ran on one in the second."""
    text = tool.section(rows(), EXCHANGE)
    measured, found, computed = text.partition("**Computed, not measured**")
    assert found and "not measured yet" not in text
    stock = (
        "| hunyuan-33k | diffusers native (our plan on stock blocks) | 2 | 1,800 ms | 3,200 ms |"
    )
    assert stock in text and "| hunyuan-33k | `fora` | 2 | " in measured
    assert "`fora`" not in computed
    for recipe in ("lossless", "balanced", "cached"):
        assert f"| hunyuan-33k | `{recipe}` |" in measured
        assert f"| hunyuan-33k | `{recipe}` |" in computed
    assert "--exchange hunyuan-33k=0.8 --write" in text
    again = tool.put_in(tool.put_in("# A\n\n## What is exact\n\nb\n", text), text)
    assert again == f"# A\n\n{text}\n## What is exact\n\nb\n"
    with pytest.raises(ValueError, match="needs a heading"):
        tool.put_in("# A\n", text)


def test_what_four_cards_took_stands_beside_what_was_computed(tool):
    """Against one card, and against diffusers on as many."""
    four = "lossless, 4 cards", STOCK.replace("2 cards", "4 cards")
    more = [row(name, GENERATION, s, 1.0) for name, s in zip(four, (0.8, 1.2), strict=True)]
    measured, _, computed = tool.section([*rows(), *more], EXCHANGE).partition("**Computed")
    one = step_on(1, 0.05, *RECIPES["lossless"])
    line = f"| `lossless` | 4 | 800 ms | {one * 1e3:,.0f} ms | {one / 0.8:.2f}x | 1.50x |"
    assert line in measured and "| 4 cards | 4 cards, measured | 8 cards |" in computed
    (line,) = (each for each in computed.splitlines() if "| `lossless` |" in each)
    assert f"| 800 ms, {one / 0.8:.2f}x |" in line


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["hunyuan-33k"], "MODEL=MILLISECONDS, got 'hunyuan-33k'"),
        (["hunyuan-33k=0"], "got 'hunyuan-33k=0'"),
        (["hunyuan=1"], "got 'hunyuan=1'"),
        ([], "exchange must be of hunyuan-33k, got none"),
        (["flux-2048=1"], "exchange must be of hunyuan-33k, got flux-2048"),
    ],
)
def test_a_wrong_exchange_is_refused(tool, pairs, message):
    with pytest.raises(ValueError, match=message):
        tool.section(rows(), tool.exchange_of(pairs))


def test_without_a_pair_there_is_no_section(tool):
    with pytest.raises(ValueError, match="both on one card and on 2 cards"):
        tool.section([each for each in rows() if "2 cards" not in each["recipe"]], EXCHANGE)


def test_the_page_is_of_the_measured_rows(tool):
    """The section is what the command in it makes of the rows; without rows there is none."""
    page = tool.PAGE.read_text(encoding="utf-8")
    data = results.read(tool.DATA, GenerationRow)
    assert (tool.HEADING in page) == bool(data)
    if data:
        (line,) = (x for x in page.splitlines() if x.startswith("python tools/scaling_model.py"))
        pairs = [word for word in shlex.split(line) if "=" in word]
        assert tool.section(data, tool.exchange_of(pairs)) in page
