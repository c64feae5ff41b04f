"""The pages are run: their examples, commands, recipes, links, tables; the site builds strictly."""

import dataclasses
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from guide import examples

import flashomni
from flashomni.cli import app
from flashomni.lab import zoo

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md"]
PAGES += sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TOOLS = ("flashomni", "make", "pip", "python", "torchrun")
NOT_RUN = {  # what a block of code begins with, and why it is not run
    "registry, util": "who may import whom: tests/unit/test_structure.py parses the imports",
    '@register("attention", "NAME"': "the frame of a kernel: what it names is the reader's",
    "q = sparse_gemm_q(x, symbols)": "what a layer does, in words; the ops are run below it",
    "serve run flashomni.serve:app": "a server: tests/serve/test_server.py starts it and runs curl",
    "src/flashomni/": "the tree: test_the_tree_is_the_tree looks at each name",
}


def blocks(page):
    """``(language, code)`` of each block of code of a page."""
    return FENCE.findall((ROOT / page).read_text(encoding="utf-8"))


def commands(code):
    """The lines of a block that a shell would run; a line that ends with a backslash goes on."""
    lines = code.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.partition(" ")[0] in TOOLS]


def site():
    spec = importlib.util.spec_from_file_location("docs_site", ROOT / "tools/docs_site.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["docs_site"] = module
    spec.loader.exec_module(module)
    return module


WITH_PYTHON = [page for page in PAGES if any(name == "python" for name, _ in blocks(page))]
RUN = [page for page in WITH_PYTHON if page not in ("README.md", "CONTRIBUTING.md")]
QUICK = ("docs/settings.md", "docs/models.md")


@pytest.mark.parametrize(
    "page", [page if page in QUICK else pytest.param(page, marks=pytest.mark.slow) for page in RUN]
)
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch):
    """One after the other, as a reader would type them; FLUX has random weights here."""
    import diffusers

    pipe = zoo.random_pipeline("tiny-image", heads=2, head_dim=32, dual=1, single=1).pipe
    pipe.default_sample_size = 16
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(diffusers.FluxPipeline, "from_pretrained", lambda name: pipe)
    monkeypatch.chdir(tmp_path)
    scope = {}
    for language, code in blocks(page):
        if language == "python":
            exec(compile(code, page, "exec"), scope)


def test_every_block_of_code_is_run():
    """Here, by test_readme.py or test_guide.py; at most five are excepted, with their reason."""
    marked = examples()
    excepted = []
    for page in PAGES:
        for language, code in blocks(page):
            known = language == "python" and page != "CONTRIBUTING.md"
            known |= language.partition(" example=")[2] in marked and page == "CONTRIBUTING.md"
            known |= language in ("json", "yaml") or bool(commands(code))
            if not known:
                excepted += [start for start in NOT_RUN if code.startswith(start)] or [code]
    assert sorted(excepted) == sorted(NOT_RUN) and len(NOT_RUN) <= 5


@pytest.mark.parametrize("page", PAGES)
def test_the_recipes_of_a_page_are_recipes(page):
    """Whole ones, or some of their keys; every section and setting is known."""
    for language, code in blocks(page):
        if language in ("json", "yaml"):
            text = code if language == "yaml" or code.lstrip().startswith("{") else f"{{{code}}}"
            data = json.loads(text) if language == "json" else yaml.safe_load(text)
            recipe = flashomni.Recipe.from_dict({"policy": {"name": "cached"}, **data})
            assert recipe.to_dict().keys() >= data.keys()


@pytest.mark.parametrize("page", PAGES)
def test_recipes_that_a_page_names_are_recipes(page):
    """Words of code like `balanced:interval=3`."""
    text = FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    known = {*flashomni.engine.recipe.presets(), *flashomni.engine.recipe.methods()}
    for words in re.findall(r"`(\w+:\w+=[^`\s]+)`", text):
        if words.partition(":")[0] in known:
            assert flashomni.Recipe.of(words).name == words


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_exist(page):
    """Each takes these arguments; what is made or run is there."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for code in (code for language, code in blocks(page) if not language):
        for line in commands(code):
            tool, *words = shlex.split(line, comments=True)
            if tool == "flashomni":
                parse(words, line)
            elif tool == "torchrun":
                assert words[:1] + words[2:4] == ["--nproc-per-node", "-m", "flashomni"], line
                told = parse(words[4:], line)
                assert told["ulysses"] * told["cfg"] == int(words[1]), line
            elif tool == "make":
                assert words[0] in targets, line
            elif tool == "python" and words[0] != "-m":
                assert (ROOT / words[0]).exists(), line


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_commands_in_a_sentence_exist(page):
    """Words of code like `flashomni bench e2e --model hunyuan-33k`, with the options they name."""
    text = FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"`make ([a-z-]+)", text)) <= set(targets)
    for words in re.findall(r"`flashomni ([^`]+)`", text):
        if words.startswith("symbols "):  # what a file of them begins with
            continue
        command, rest = typer.main.get_command(app), words.split()
        while rest and hasattr(command, "commands"):
            assert rest[0] in command.commands, words
            command = command.commands[rest.pop(0)]
        known = {name for each in command.params for name in (*each.opts, *each.secondary_opts)}
        named = {word.partition("=")[0] for word in rest if word.startswith("--")}
        assert named <= known | {"--help"}, words


def parse(words, line):
    """Its settings as typer parses them; nothing is run."""
    command, path = typer.main.get_command(app), "flashomni"
    while words and words[0] in getattr(command, "commands", {}):
        path = f"{path} {words[0]}"
        command = command.commands[words.pop(0)]
    assert not hasattr(command, "commands"), line
    return command.make_context(path, list(words)).params


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page_lead_somewhere(page):
    """Files beside it, and headings in them."""
    text = FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    for target, anchor in re.findall(r"\]\(([^)\s#]*)#?([^)\s]*)\)", text):
        if "://" in target:
            continue
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, titles), f"{target}#{anchor}"


def slug(title):
    """The anchor of a heading, as GitHub and Python-Markdown make it."""
    words = re.sub(r"[^\w\s-]", "", title.lower()).strip()
    return re.sub(r"[\s-]+", "-", words)


def test_the_tree_is_the_tree():
    """Every folder that it names is there, and every part of the package is named."""
    trees = [code for _, code in blocks("docs/how-it-works.md") if code.startswith("src/")]
    (tree,) = trees
    inside = set(re.findall(r"^  ([a-z_.]+)", tree, re.MULTILINE))
    outside = set(re.findall(r"^([a-z]+)/ ", tree, re.MULTILINE))
    package = Path(flashomni.__file__).parent
    assert {name for name in inside if not (package / name).exists()} == set()
    assert {name for name in outside if not (ROOT / name).exists()} == set()
    folders = {path.parent.name for path in package.glob("*/__init__.py")} - {"util"}
    assert folders <= inside


def test_every_setting_says_what_it_costs():
    """docs/settings.md has a row for each setting of a section: add one for yours."""
    text = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    table = text.partition("## What settings cost")[2].partition("\n## ")[0]
    told = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) - {"schedule"}
    parts = [flashomni.Recipe.of("balanced").__dataclass_fields__[name].default_factory
             for name in ("forecast", "storage", "sparse", "guidance")]  # fmt: skip
    assert told == {field.name for part in parts for field in dataclasses.fields(part)}


def test_tables_are_made_of_docstrings():
    """Each setting of each policy, schedule and section has a row that says something."""
    pages = site()
    for name in pages.sections():
        for row in pages.table(name).splitlines()[2:]:
            assert not row.endswith("|  |"), row
    text = pages.table("policies") + pages.table("schedules")
    assert "### `flashomni`" in text and "| `tau_q` | `0.5` |" in text
    assert ":class:" not in text and "``" not in text
    assert not [row for row in text.splitlines() if row.endswith("|  |")]
    for name in ("recipes", "models", "forecasts"):
        assert pages.table(name).count("\n") > 5


def test_rendered_pages_link_within_the_site():
    """Files outside of docs/ lead to the page that includes them, or are shown as paths."""
    pages = site()
    told = []
    home = pages.render("<!-- include: README.md -->", "index.md", lambda *a: told.append(a))
    assert (
        "](quickstart.md)" in home and "](extending.md)" in home and "](images/dense.png)" in home
    )
    assert "examples (`examples`)" in home and not told
    page = pages.render("[a](../../README.md#install) [b](no.md)", "studies/x.md",
                        lambda *a: told.append(a))  # fmt: skip
    assert page == "[a](../index.md#install) [b](no.md)" and len(told) == 1


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path):
    """A page that is not in the menu, a link or an anchor that leads nowhere: an error."""
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    made = subprocess.run(
        # not --quiet: it hides warnings from --strict as well
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert made.returncode == 0, made.stdout + made.stderr
    assert "How it works" in (tmp_path / "index.html").read_text(encoding="utf-8")
