"""The README is run: its examples, its commands, its links, its tree."""

import re
import shlex
from pathlib import Path

import pytest
import typer

import flashomni
from flashomni.cli import app
from flashomni.lab import zoo

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for name, text in fences if name == language]


@pytest.mark.slow
def test_the_examples_run(tmp_path, monkeypatch, capsys):
    """One after the other, as a reader would type them, on a FLUX of random weights."""
    import diffusers

    pipe = zoo.random_pipeline("tiny-image", heads=2, head_dim=32, dual=1, single=1).pipe
    pipe.default_sample_size = 32
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(diffusers.FluxPipeline, "from_pretrained", lambda name: pipe)
    monkeypatch.chdir(tmp_path)
    scope = {}
    assert len(blocks("python")) == 3
    for example in blocks("python"):
        exec(compile(example, "README.md", "exec"), scope)
    assert scope["image"].size and "FLOPs" in capsys.readouterr().out
    assert flashomni.engine_of(pipe) is scope["engine"]
    assert scope["engine"].recipe == scope["same"].replace(name=scope["engine"].recipe.name)
    assert flashomni.Recipe.of("mine.json") == scope["same"]
    assert flashomni.restore(pipe) and flashomni.engine_of(pipe) is None


def test_the_recipe_in_yaml_is_one(tmp_path):
    """Every section and setting is known, and arrives."""
    (text,) = blocks("yaml")
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    recipe = flashomni.Recipe.of(path)
    assert (recipe.name, recipe.policy.tau_kv, recipe.schedule.interval) == ("mine", 0.1, 5)
    assert recipe.forecast.layer_order == 2 and recipe.sparse.degrade_below == 0.5


def test_its_commands_exist():
    """Each command and each option of it."""
    lines = [line.partition("#")[0] for line in README.splitlines() if line.startswith("flashomni")]
    assert len(lines) >= 8
    for line in lines:
        command, words = typer.main.get_command(app), shlex.split(line)[1:]
        while words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        assert not hasattr(command, "commands"), line
        options = {name for parameter in command.params for name in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options, line


def test_its_targets_exist():
    """What it tells to make, the Makefile makes."""
    known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"demo", "quick", "test", "wheels"} <= set(re.findall(r"make ([a-z-]+)", README))
    told = set(re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)`", README, re.MULTILINE))
    assert {first or second for first, second in told} <= set(known)


@pytest.mark.parametrize("page", ["README.md", "docs/results.md", "docs/performance.md"])
def test_links_lead_somewhere(page):
    """Pages and pictures beside it."""
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert links or page.endswith("performance.md")
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []


def test_the_tree_is_the_tree():
    """Every folder that it names is there, and every part of the package is named."""
    (tree,) = [block for block in blocks("") if block.startswith("src/flashomni/")]
    inside = set(re.findall(r"^  ([a-z_.]+)", tree, re.MULTILINE))
    outside = set(re.findall(r"^([a-z]+)/ ", tree, re.MULTILINE))
    package = Path(flashomni.__file__).parent
    assert {name for name in inside if not (package / name).exists()} == set()
    assert {name for name in outside if not (ROOT / name).exists()} == set()
    folders = {path.parent.name for path in package.glob("*/__init__.py")} - {"util"}
    assert folders <= inside
