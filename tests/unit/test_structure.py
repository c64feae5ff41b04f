"""The layout is a contract: imports point downwards, additions are one file, the CLI is frozen."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import flashomni
from flashomni import dispatch as dispatching
from flashomni.engine.forecasts import forecasts
from flashomni.engine.schedules import schedules
from flashomni.kernels import OPS, registered
from flashomni.models import adapters
from flashomni.policies import policies

ROOT = Path(flashomni.__file__).parent
TESTS = Path(__file__).parent
# Part of the package -> parts it may import. Tools stand above everything.
MAY_IMPORT = {
    "registry": set(),
    "util": set(),
    "page": {"util"},
    "flatten": set(),
    "triton_host": set(),
    "dispatch": {"registry", "flatten"},
    "symbols": {"dispatch", "flatten", "triton_host"},
    "policies": {"registry", "symbols"},
    "kernels": {"dispatch", "flatten", "triton_host", "symbols"},
    "parallel": {"symbols"},
    "engine": {
        "registry", "util", "page", "dispatch", "symbols", "policies", "kernels", "parallel",
    },
    "models": {"registry", "util", "dispatch", "symbols", "kernels", "engine", "parallel"},
    "compat": {"dispatch", "symbols", "kernels"},
    "attention": {"compat"},
    "lab": {
        "registry", "util", "page", "dispatch", "symbols", "policies", "kernels", "parallel",
        "engine", "models",
    },
    "tuning": {"util", "policies", "engine", "models", "lab"},
    "studio": {"util", "policies", "engine", "models", "lab", "tuning"},
    "plugins": {"engine", "models"},
    "serve": {"util", "policies", "engine", "models", "lab"},
    "__main__": {"lab", "cli"},
    "cli": {
        "util", "dispatch", "kernels", "policies", "parallel", "engine", "models", "lab", "tuning",
        "studio",
    },
}  # fmt: skip
DIFFUSERS = {"models"}
DIFFUSERS_FILES = {
    ROOT / "lab" / name
    for name in (
        "zoo.py",
        "small.py",
        "e2e/models.py",
        "e2e/newer.py",
        "e2e/ranks.py",
        "e2e/stock.py",
        "fidelity/peers.py",
    )
}
TRITON = {"kernels", "symbols", "triton_host"}
CLI = {
    "generate": {
        "--model", "--recipe", "--compare", "--out", "--steps", "--seed", "--device", "--dtype",
        "--backend", "--ulysses", "--cfg", "PROMPT",
    },
    "eval": {
        "--model", "--method", "--prompt", "--count", "--split", "--seed", "--scorer",
        "--measure", "--out", "--csv", "--steps", "--device", "--dtype", "--backend",
    },
    "compare": {
        "METHODS", "--model", "--rival", "--prompt", "--count", "--seed", "--measure", "--batch",
        "--csv", "--out", "--steps", "--device", "--dtype", "--backend",
    },
    "show": {"TOPIC", "NAME"},
    "tune": {
        "--model", "--prompts", "--count", "--held-back", "--steps", "--target-speedup",
        "--target-psnr", "--pareto", "--computed", "--tries", "--sparse", "--layer-runs",
        "--groups", "--memory", "--seed", "--out", "--device", "--dtype",
    },
    "studio": {"--model", "--recipe", "--host", "--port", "--share", "--device", "--dtype"},
    "tune-kernels": {"--head-dim", "--seconds", "--device", "--dtype"},
    "doctor": {"PIPE_FOLDER"},
    "bench op": {
        "OP", "--shape", "--density", "--device", "--dtype", "--backend", "--rounds", "--csv",
        "--plot",
    },
    "bench kernels": {
        "--part", "--device", "--dtype", "--backend", "--rounds", "--seconds", "--csv",
    },
    "bench e2e": {
        "--model", "--recipe", "--baseline", "--steps", "--stock-steps", "--whole", "--device",
        "--dtype", "--backend", "--structure", "--seed", "--csv", "--plot", "--profile",
        "--generation", "--ulysses", "--cfg",
    },
    "bench sparsity": {
        "--model", "--point", "--mode", "--dispatch-steps", "--device", "--dtype", "--backend",
        "--structure", "--seed", "--csv", "--plot",
    },
}  # fmt: skip
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def part_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path):
    """Every module that a file imports, anywhere in it, type checking blocks left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            if node.module == "flashomni":
                yield from (f"flashomni.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path):
    """A part imports only parts below it; only models and zoo know diffusers."""
    part = part_of(path)
    assert part in MAY_IMPORT, f"say in this test what {part} may import"
    for name in imported(path):
        top, _, rest = name.partition(".")
        if top == "flashomni" and rest:
            other = rest.partition(".")[0]
            assert other == part or other in MAY_IMPORT[part], f"{part} imports {other}"
        if top == "diffusers":
            assert part in DIFFUSERS or path in DIFFUSERS_FILES, f"{path} imports diffusers"
        if top == "triton":
            assert part in TRITON, f"{part} imports triton"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_small(path):
    """A file is one idea: at most 400 lines, a Hopper kernel 900."""
    limit = 900 if path.stem == "sm90" else 400
    assert len(path.read_text(encoding="utf-8").splitlines()) <= limit


@pytest.mark.parametrize("folder", ["tools", "studies", "tests"])
def test_files_beside_the_package_stay_small(folder):
    """Likewise."""
    paths = (ROOT.parents[1] / folder).rglob("*.py")
    sizes = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    assert sizes and {name: size for name, size in sizes.items() if size > 400} == {}


@pytest.mark.slow
def test_import_loads_no_heavy_library():
    """``import flashomni`` loads neither diffusers nor triton nor matplotlib."""
    code = (
        "import sys, flashomni; "
        "bad = {'diffusers', 'transformers', 'triton', 'matplotlib', 'typer'} & set(sys.modules); "
        "sys.exit(', '.join(bad) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def public_files(folder):
    return {p.stem for p in (ROOT / folder).glob("*.py") if not p.stem.startswith("_")}


def test_every_policy_file_registers_a_policy_of_its_name():
    """The file's name is the policy's name."""
    assert set(policies()) == public_files("policies")


@pytest.mark.parametrize(
    ("folder", "known"), [("engine/schedules", schedules), ("engine/forecasts", forecasts)]
)
def test_every_schedule_and_forecast_has_a_file_of_its_name(folder, known):
    """One file each, and one name a file."""
    assert set(known()) == public_files(folder)


def test_every_model_file_registers_an_adapter():
    """A file in models/ is an adapter."""
    modules = {type(adapter).__module__.rpartition(".")[2] for adapter in adapters().values()}
    assert modules == public_files("models")


def test_every_backend_file_is_registered_or_refuses_with_a_reason():
    """No backend disappears in silence."""
    for folder, ops in dispatching.FOLDERS.items():
        path = folder.removeprefix("flashomni.").replace(".", "/")
        for name in public_files(path) - {"op"}:
            for op in ops:
                known = {backend.name for backend in registered(op)}
                assert name in known or (op, name) in dispatching._broken


def test_every_op_has_a_definition():
    """Each op has the backend ``reference``, of the lowest rank."""
    for op in OPS:
        assert registered(op)[-1].name == "reference"


def test_a_backend_that_cannot_be_imported_is_a_refusal(tmp_path, monkeypatch):
    """Its ImportError is the reason that users read."""
    monkeypatch.setitem(dispatching._broken, ("attention", "moon"), "cannot be imported: no moon")
    assert dispatching.refusals("attention")["moon"] == "cannot be imported: no moon"
    with pytest.raises(NotImplementedError, match="moon: cannot be imported: no moon"):
        dispatching.select("attention", None, "moon")


def test_the_command_line_is_frozen():
    """Options are an interface: adding or renaming one is a decision, made here."""
    import typer

    from flashomni.cli import app

    def leaves(group, path=()):
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from leaves(command, (*path, name))
            else:
                yield " ".join((*path, name)), command

    found = {}
    for name, command in leaves(typer.main.get_command(app)):
        names = set()
        for parameter in command.params:
            is_option = parameter.param_type_name == "option"
            names.add(max(parameter.opts, key=len) if is_option else parameter.name.upper())
        found[name] = names - {"--help"}
    assert found == CLI


@pytest.mark.parametrize("path", sorted(TESTS.glob("test_*.py")), ids=lambda path: path.stem)
def test_every_file_of_tests_takes_part_in_make_quick(path):
    """A contract that the quick loop never tries is found broken too late."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    whole = [
        node
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "pytestmark"
    ]
    assert not [node for node in whole if "slow" in ast.dump(node)], "the whole file is slow"
    tests = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    # A mark of the function, not of one of its cases.
    marks = [[getattr(mark, "attr", "") for mark in node.decorator_list] for node in tests]
    fast = [names for names in marks if "slow" not in names]
    assert fast, "every test is marked slow: leave one to `make quick`"


def test_quick_takes_every_test_and_few_cases(pytestconfig):
    """One case of each function that is not slow, not always the first."""

    class Item:
        def __init__(self, nodeid, *marks):
            self.nodeid, self.marks = nodeid, marks

        def get_closest_marker(self, name):
            return name if name in self.marks else None

    plugins = pytestconfig.pluginmanager.get_plugins()
    quick = next(plugin.quick for plugin in plugins if hasattr(plugin, "quick"))
    items = [Item("a::x"), *(Item(f"a::y[{i}]") for i in range(9)), Item("a::z", "slow")]
    items += [Item("b::w[1]", "gpu"), Item("b::w[2]"), Item("b::v[[odd]]")]
    items += [Item(f"c::{x}[{i}]") for x in "st" for i in range(3)]
    names = [item.nodeid for item in quick(items)]
    assert names == ["a::x", "a::y[1]", "b::w[2]", "b::v[[odd]]", "c::s[1]", "c::t[2]"]
