"""What stands around the code says what is true: citation, policy, forms, and what CI runs."""

import ast
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer
import yaml

import flashomni
from flashomni.cli import app

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(flashomni.__file__).parent
HOME = ROOT / ".github"
WORKFLOWS = sorted((HOME / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (HOME / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
MINOR = flashomni.__version__.rpartition(".")[0]
UNSAFE = {"pickle", "dill", "cloudpickle", "marshal", "shelve"}


def read(path):
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_the_version_is_the_same_everywhere():
    """What is cited, what is supported, and the newest part of the changelog."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert project["tool"]["hatch"]["version"]["path"] == "src/flashomni/__init__.py"
    assert read("CITATION.cff")["version"] == flashomni.__version__
    changes = re.findall(r"^## (\S+?),? ", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert changes[0] == flashomni.__version__
    assert f"| {MINOR} | yes |" in (ROOT / "SECURITY.md").read_text("utf-8")


def test_the_citation_is_of_this_software_and_names_the_paper():
    """What the format asks for; the paper is a reference, not what is cited in our place."""
    told = read("CITATION.cff")
    assert told["cff-version"] == "1.2.0" and told["type"] == "software" and told["message"]
    assert told["title"] == "FlashOmni" and told["authors"] == [
        {"name": "The FlashOmni developers"}
    ]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert told["license"] == project["license"]
    assert "preferred-citation" not in told
    (paper,) = told["references"]
    assert paper["type"] == "article" and paper["year"] == 2025 and len(paper["authors"]) == 6
    assert paper["doi"] == "10.48550/arXiv.2509.25401"
    assert paper["url"] == project["urls"]["Paper"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_runs_what_make_runs(path):
    """Its targets exist, a matrix of them too; it ends by itself and may do little."""
    told = read(path)
    text = path.read_text(encoding="utf-8")
    triggers = told[True]  # YAML 1.1 reads `on` so
    assert "pull_request_target" not in triggers
    permissions = told["permissions"]
    assert permissions == {"contents": "write" if path.stem == "docs" else "read"}
    made = set()
    for job in told["jobs"].values():
        assert job["timeout-minutes"] <= 60 and job["runs-on"]
        made |= set(job.get("strategy", {}).get("matrix", {}).get("target", ()))
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert "@" in step.get("uses", "@")
            if "actions/checkout" in step.get("uses", "") and path.stem != "docs":
                assert step["with"]["persist-credentials"] is False, "nothing here pushes"
            command = step.get("run", "")
            assert "${{" not in re.sub(r"\$\{\{ matrix\.target \}\}", "", command), "no injection"
            made |= set(re.findall(r"\bmake ([a-z-]+)", command))
    assert made <= TARGETS and (made or path.stem == "none")
    assert "secrets." not in text


def test_ci_runs_what_a_contributor_runs():
    """And a release is tested before it is built, of a tag that is its version."""
    targets = read(".github/workflows/ci.yml")["jobs"]["make"]["strategy"]["matrix"]["target"]
    assert {"quick", "test", "docs", "demo"} <= set(targets)
    jobs = read(".github/workflows/release.yml")["jobs"]
    runs = [step["run"] for step in jobs["build"]["steps"] if "run" in step]
    assert [run.partition("#")[0].split()[1] for run in runs] == ["test", "dist"]
    assert "TAG=" in runs[1]
    assert not any("cache" in step.get("with", {}) for step in jobs["build"]["steps"])
    publish = jobs["publish"]
    assert publish["needs"] == "build" and publish["permissions"] == {"id-token": "write"}


def test_what_dependabot_looks_after_is_there():
    """Folders, and of the tools those that are pinned."""
    told = read(".github/dependabot.yml")
    for update in told["updates"]:
        for folder in update.get("directories", [update.get("directory")]):
            assert (ROOT / folder.strip("/")).is_dir()
    assert {update["package-ecosystem"] for update in told["updates"]} == {"github-actions", "pip"}


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_an_issue_form_asks_what_is_needed(path):
    """Every field has an id and a question, and the commands that it asks for exist."""
    told = read(path)
    assert told["name"] and told["description"] and told["labels"]
    ids = [part["id"] for part in told["body"]]
    assert len(set(ids)) == len(ids)
    assert all(part["attributes"]["label"] for part in told["body"])
    assert any(part.get("validations", {}).get("required") for part in told["body"])
    text = path.read_text(encoding="utf-8")
    for line in re.findall(r"`flashomni ([^`]+)`", text):
        command, words = typer.main.get_command(app), shlex.split(line)
        while words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        command.make_context("flashomni", words)
    if path.stem != "question":
        assert "`flashomni doctor`" in text and "engine.report()" in text


def test_links_of_the_policy_and_the_templates_lead_somewhere():
    """Files that they name exist."""
    for page in (ROOT / "SECURITY.md", HOME / "PULL_REQUEST_TEMPLATE.md"):
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"\b(?:docs/)?[\w-]+\.md\b", text):
            assert (ROOT / name).exists(), name


def test_nothing_is_loaded_that_could_run_code():
    """SECURITY.md's first promise: no pickle, no code from a Hub, YAML as plain data only."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not UNSAFE & {alias.name.partition(".")[0] for alias in node.names}, path
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").partition(".")[0] not in UNSAFE, path
            elif isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("torch.load", "torch.save", "eval", "exec"), path
                assert called != "yaml.load" or ast.unparse(node.args[1]) == "Loader", path
                assert not {key.arg for key in node.keywords} & {"trust_remote_code"}, path
