"""One registry for all that can be added: names are explicit, unique, and found once."""

import importlib
import json
import subprocess
import sys
import textwrap
import threading
from dataclasses import dataclass
from importlib.metadata import EntryPoint

import pytest
import torch

from flashomni import registry as module
from flashomni.engine import Recipe
from flashomni.lab.fidelity.peers import PEERS
from flashomni.models import ADAPTERS, adapter
from flashomni.policies import POLICIES, Policy, make_policy, policies, policy
from flashomni.registry import NameTakenError, Registry

TABLE = torch.ones(2)
SOURCE = """
from dataclasses import dataclass
from flashomni.policies import Policy, policy
from flashomni.symbols import Symbols

@policy("{name}")
@dataclass(frozen=True)
class {cls}(Policy):
    share: float = {share}

    def __call__(self, site):
        return Symbols.dense(site.grid, site.q.shape[0], site.q.shape[2])
"""


@pytest.fixture
def names():
    """Names that a test takes; they are given back."""
    taken = []
    yield taken
    for name in taken:
        POLICIES.remove(name)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A place for modules that can be imported; they are forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def script(text, *arguments):
    """A user's script, in a process of its own: its classes are of the module __main__."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text), *arguments], capture_output=True, text=True
    )


def fresh(monkeypatch, *points):
    """A registry of policies that has found nothing yet, and these entry points."""
    made = Registry("policy", "flashomni.policies", "flashomni.policies")
    monkeypatch.setattr(module, "entry_points", lambda group: list(points))
    monkeypatch.setattr(made, "_import_package", lambda: None)
    # Modules that are imported already do not register again: begin with what they registered.
    made._found, made._origins = dict(POLICIES._found), dict(POLICIES._origins)
    monkeypatch.setattr("flashomni.policies.POLICIES", made)
    return made


def point(name, value):
    return EntryPoint(name, value, "flashomni.policies")


@pytest.mark.slow
def test_two_policies_of_one_script_keep_their_names():
    """Both are of the module __main__; each recipe comes back from JSON as what it was."""
    text = "".join(
        SOURCE.format(name=name, cls=name.title(), share=share)
        for name, share in (("one", 0.25), ("two", 0.75))
    )
    done = script(
        text
        + textwrap.dedent("""
            import json
            from flashomni.engine import Recipe
            for cls in (One, Two):
                recipe = Recipe(policy=cls())
                again = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
                assert type(again.policy) is cls and again == recipe, again
                assert type(recipe.with_settings("x", {"share": 0.5}).policy) is cls
                assert Recipe.of(cls.name).policy == cls()
        """)
    )
    assert done.returncode == 0, done.stderr


def test_a_file_named_window_does_not_replace_the_window(folder, names):
    """Neither when its policy has another name, nor when it asks for that one."""
    ours = policies()["window"]
    (folder / "window.py").write_text(SOURCE.format(name="pane", cls="Window", share=1.0))
    names.append("pane")
    theirs = importlib.import_module("window").Window
    assert policies()["window"] is ours and policies()["pane"] is theirs
    (folder / "window2.py").write_text(SOURCE.format(name="window", cls="Window", share=1.0))
    with pytest.raises(NameTakenError, match=r"'window' is registered twice, by flashomni\.polic"):
        importlib.import_module("window2")
    assert policies()["window"] is ours and make_policy("window").name == "window"


@pytest.mark.slow
def test_a_builtin_keeps_its_name_in_a_script_that_comes_first():
    """The user's class registers before anything was looked for: it is refused all the same."""
    done = script(SOURCE.format(name="window", cls="Window", share=1.0))
    assert done.returncode == 1
    assert "NameTakenError: policy 'window' is registered twice" in done.stderr


@pytest.mark.slow
def test_the_same_definition_may_come_again(folder, names):
    """A module that is reloaded, and a cell that is run again: the newest counts."""
    names.append("again")
    path = folder / "again_module.py"
    path.write_text(SOURCE.format(name="again", cls="Again", share=0.25))
    first = importlib.import_module("again_module")
    old = first.Again
    path.write_text(SOURCE.format(name="again", cls="Again", share=0.125))
    importlib.invalidate_caches()
    importlib.reload(first)
    assert policies()["again"] is first.Again is not old
    assert make_policy("again").share == 0.125
    cell = SOURCE.format(name="cell", cls="Cell", share=0.25)
    done = script(
        f"cell = {cell!r}\nexec(cell)\nexec(cell.replace('0.25', '0.5'))\n"
        "from flashomni.policies import make_policy\nassert make_policy('cell').share == 0.5"
    )
    assert done.returncode == 0, done.stderr


def test_equal_modules_in_two_files_are_two_things(tmp_path, names):
    """Two scripts' modules may have one name and one class name: their file tells them apart."""
    names.append("twin")
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "plugin.py").write_text(
            SOURCE.format(name="twin", cls="Twin", share=0.5)
        )
    try:
        load(tmp_path / "a" / "plugin.py")
        with pytest.raises(NameTakenError, match=r"'twin' is registered twice, by plugin\.Twin"):
            load(tmp_path / "b" / "plugin.py")
    finally:
        sys.modules.pop("plugin", None)


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    sys.modules[path.stem] = made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.mark.parametrize(
    "name", ["", "two words", "a:b", "a,b", "a=b", "a/b", "a\\b", "[x]", "a\n"]
)
def test_names_are_words(name):
    """What the command line and files could not say is no name."""
    with pytest.raises(ValueError, match="the name of a policy must be a word"):
        POLICIES.add(name, Policy)


def test_without_the_decorator_the_cure_is_named():
    """Before a generation, not after it; also where a base class has a name."""

    @dataclass(frozen=True)
    class Lonely(type(make_policy("window"))):
        pass

    for use in (lambda: Lonely().to_dict(), lambda: Recipe(policy=Lonely())):
        with pytest.raises(ValueError, match=r'Lonely is not registered.*put @policy\("its-name"'):
            use()


def test_a_decorator_without_a_name_or_a_dataclass_says_so():
    """The old spelling, a class that is no dataclass, one that is no policy."""

    @dataclass(frozen=True)
    class Thing(Policy):
        pass

    class Plain(Policy):
        pass

    @dataclass
    class Soft(Policy):
        pass

    with pytest.raises(TypeError, match=r'@policy needs a name, @policy\("its-name"\), got <class'):
        policy(Thing)
    for cls in (Plain, Soft):
        with pytest.raises(TypeError, match=f"policy {cls.__name__} must be a frozen dataclass"):
            policy("thing")(cls)
    with pytest.raises(TypeError, match="must be a subclass of Policy"):
        policy("thing")(int)
    assert "thing" not in policies()


def test_settings_are_json_values(names):
    """At registration for a default, at construction for what is given."""
    names.append("values")
    with pytest.raises(ValueError, match=r"table of policy values must be .*got tensor"):

        @policy("values")
        @dataclass(frozen=True)
        class Default(Policy):
            table: torch.Tensor = TABLE

    assert "values" not in policies()

    @policy("values")
    @dataclass(frozen=True)
    class Values(Policy):
        table: object = None

    assert make_policy("values", table=[1, 2]).to_dict() == {"name": "values", "table": [1, 2]}
    for bad in (object(), torch.ones(1), float("nan"), {1, 2}, (1, 2)):
        with pytest.raises(ValueError, match="table of policy values must be a JSON value"):
            make_policy("values", table=bad)
        with pytest.raises(ValueError, match="table of policy values must be a JSON value"):
            Recipe(policy=Values(table=bad))


def test_an_entry_point_is_found_by_name(folder, monkeypatch):
    """Only when somebody asks; then like any other."""
    (folder / "far.py").write_text(SOURCE.format(name="far", cls="Far", share=0.5))
    made = fresh(monkeypatch, point("far", "far"))
    assert "far" not in sys.modules
    assert made.get("far").name == "far" and made.broken() == {}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "import nowhere_to_be_found",
            "ModuleNotFoundError: No module named 'nowhere_to_be_found'",
        ),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def", "SyntaxError: invalid syntax"),
        ("", "registers no policy of its name"),
    ],
)
def test_an_entry_point_that_fails_is_a_named_reason(text, reason, folder, monkeypatch):
    """The others work; who asks for it reads why."""
    (folder / "broken_one.py").write_text(text)
    made = fresh(monkeypatch, point("broken", "broken_one"))
    assert "window" in made and "broken" not in made
    assert reason in made.broken()["broken"]
    with pytest.raises(ValueError, match=f"got 'broken' .entry point of .*{reason}"):
        made.get("broken")


@pytest.mark.parametrize("registers", [True, False])
def test_an_entry_point_with_a_builtin_name_is_loud(registers, folder, monkeypatch):
    """Each time, with the group or the entry point: nobody may wonder which of two ran."""
    name = "window" if registers else "other"
    (folder / "rival.py").write_text(SOURCE.format(name=name, cls="Rival", share=0.5))
    made = fresh(monkeypatch, point("window", "rival"))
    for _ in range(2):
        with pytest.raises(NameTakenError, match="unknown package"):
            made.all()


def test_two_packages_with_one_name_are_loud(folder, monkeypatch):
    """Neither of them wins: the message names both definitions and the second's entry point."""
    for package in ("first_pack", "second_pack"):
        (folder / f"{package}.py").write_text(SOURCE.format(name="shared", cls="X", share=0.5))
    made = fresh(monkeypatch, point("shared", "first_pack"), point("shared", "second_pack"))
    with pytest.raises(NameTakenError, match=r"first_pack\.X .*second_pack\.X .*'shared' of"):
        made.all()


def test_a_reference_to_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"policy must be one of cached, dense, .*got 'magic'"):
        POLICIES.get("magic")
    with pytest.raises(ValueError, match=r"policy must be one of .*got \['dense'\]"):
        POLICIES.get(["dense"])


@pytest.mark.slow
def test_threads_that_look_at_once_all_find_everything():
    """Whoever comes first: nobody gets a part, and nobody waits for ever."""
    done = script("""
        import sys, threading
        sys.setswitchinterval(1e-6)
        from flashomni.policies import policies
        found, barrier = [], threading.Barrier(8)

        def look():
            barrier.wait()
            found.append(tuple(policies()))

        threads = [threading.Thread(target=look) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(found) == 8 and len(set(found)) == 1 and "window" in found[0], found
    """)
    assert done.returncode == 0, done.stderr


def test_an_extension_that_looks_while_it_is_imported_does_not_hang(folder, monkeypatch):
    """One thread imports it, another finds its entry point: the first asks the registry."""
    (folder / "busy.py").write_text(
        "import threading, sys\nme = sys.modules['busy_control']\nme.started.set()\n"
        "me.go.wait(10)\nfrom flashomni.policies import POLICIES\nPOLICIES.all()\n"
        + SOURCE.format(name="busy", cls="Busy", share=0.5)
    )
    control = type(sys)("busy_control")
    control.started, control.go = threading.Event(), threading.Event()
    monkeypatch.setitem(sys.modules, "busy_control", control)
    made, seen = fresh(monkeypatch, point("busy", "busy")), []
    first = threading.Thread(target=importlib.import_module, args=("busy",), daemon=True)
    first.start()
    assert control.started.wait(10)
    second = threading.Thread(target=lambda: seen.append(made.all()), daemon=True)
    second.start()
    second.join(0.1)
    control.go.set()
    for thread in (first, second):
        thread.join(20)
        assert not thread.is_alive()
    assert "busy" in made.all()


def test_adapters_and_peers_are_unique_too():
    """The same registry, the same refusal; a class that is refused keeps no name."""
    with pytest.raises(NameTakenError, match="adapter 'FluxTransformer2DModel' is registered twi"):

        @adapter("FluxTransformer2DModel")
        class Mine:
            pass

    with pytest.raises(NameTakenError, match="peer 'cache-dit' is registered twice"):
        PEERS.add("cache-dit", int)
    assert type(ADAPTERS.get("FluxTransformer2DModel")).__module__ == "flashomni.models.flux"
    assert "cache-dit" in PEERS and "cache-dit" in sorted(PEERS)


def test_a_name_can_be_given_back():
    @policy("passing")
    @dataclass(frozen=True)
    class Passing(Policy):
        pass

    assert json.loads(json.dumps(Passing().to_dict())) == {"name": "passing"}
    POLICIES.remove("passing")
    assert "passing" not in policies()
