"""Extensions live outside this repository: a wheel with entry points is found and runs."""

import textwrap

import pytest
from guide import distribution, examples, install, lay_out, run

MODULES = ("policy", "schedule", "forecast", "adapter")
NAMES = {"policies": "diagonal", "schedules": "early", "forecasts": "damped", "adapters": "TinyDiT"}
LISTS = """
from flashomni.engine import forecasts, schedules
from flashomni.models import adapters
from flashomni.policies import policies
"""


def python(site, text):
    return run("-c", textwrap.dedent(text), path=[site])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The package of the guide, built as a wheel and installed beside the environment."""
    found = examples()
    modules = {name: found[name] for name in MODULES}
    return install(tmp_path_factory.mktemp("extension"), found["pyproject"], modules)


@pytest.mark.slow
def test_what_is_installed_is_found_by_its_name(site):
    """All four kinds, at the first question; nothing is imported before, nothing without it."""
    done = python(
        site,
        f"""
        import sys
        {LISTS.strip().replace(chr(10), chr(10) + " " * 8)}
        assert not [name for name in sys.modules if name.startswith("flashomni_extras")]
        for all, name in ((policies, "diagonal"), (schedules, "early"), (forecasts, "damped"),
                          (adapters, "TinyDiT")):
            assert name in all(), (name, list(all()))
        assert policies()["diagonal"].__module__ == "flashomni_extras.policy"
        """,
    )
    assert done.returncode == 0, done.stderr
    bare = run("-c", f"{LISTS}\nassert 'diagonal' not in policies() and 'early' not in schedules()")
    assert bare.returncode == 0, bare.stderr


@pytest.mark.slow
def test_it_runs_in_a_generation(site):
    """A policy, a schedule and a forecast on a model of the library, all three on its own model."""
    done = python(
        site,
        """
        import torch
        import flashomni
        from flashomni.models import adapters

        recipe = flashomni.Recipe.of(
            "topk", schedule="early", part=0.3, forecast="damped", order=1
        )
        skips = flashomni.Recipe.of("diagonal:reach=.3", schedule="early")
        for name in ("FluxTransformer2DModel", "TinyDiT"):
            model, inputs = adapters()[name].tiny()
            model.eval().requires_grad_(False)
            for chosen in (recipe, skips):
                with torch.no_grad(), flashomni.accelerate(model, chosen) as engine:
                    assert engine.recipe.schedule.name == "early"
                    for step in range(6):
                        engine.step(step, 6)
                        out = model(**inputs)
                        out = out if isinstance(out, torch.Tensor) else out[0]
                        assert torch.isfinite(out).all()
                    kinds = [step["kind"] for step in engine.report().steps]
                assert "update" in kinds and "dispatch" in kinds, kinds
        """,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_recipe_of_it_round_trips(site, tmp_path):
    """Through a file of JSON that another process reads; without the package the name is said."""
    path = tmp_path / "recipe.json"
    make = f"""
        import flashomni
        recipe = flashomni.Recipe.of(
            "diagonal:reach=.25", schedule="early", part=0.3, forecast="damped"
        )
        recipe.save({str(path)!r})
    """
    read = f"""
        import flashomni
        recipe = flashomni.Recipe.of({str(path)!r})
        assert recipe.policy.to_dict() == {{"name": "diagonal", "reach": 0.25}}
        assert recipe.schedule.to_dict()["part"] == 0.3 and recipe.forecast.name == "damped"
        assert flashomni.Recipe.from_dict(recipe.to_dict()) == recipe
    """
    for text in (make, read):
        done = python(site, text)
        assert done.returncode == 0, done.stderr
    bare = run("-c", f"import flashomni\nflashomni.Recipe.of({str(path)!r})")
    assert bare.returncode == 1 and "'diagonal'" in bare.stderr and "must be one of" in bare.stderr


TAKEN = {"policy": "window", "schedule": "interval", "forecast": "taylor"}
TAKEN["adapter"] = "FluxTransformer2DModel"


def test_names_of_the_library_are_refused_by_name_and_package(tmp_path):
    """A second package asks for names that are taken: each list says who, never which of two."""
    found, pyproject = examples(), examples()["pyproject"].replace("-extras", "-rival")
    pyproject = pyproject.replace("flashomni_extras", "flashomni_rival")
    modules = {}
    for (kind, name), taken in zip(NAMES.items(), TAKEN.items(), strict=True):
        text = found[taken[0]]
        assert f'("{name}")' in text, kind
        modules[taken[0]] = text.replace(f'("{name}")', f'("{taken[1]}")')
        pyproject = pyproject.replace(f"\n{name} = ", f"\n{taken[1]} = ")
    site = lay_out(tmp_path, pyproject, modules, "flashomni_rival")
    asked = f"""
for kind in ({", ".join(NAMES)}):
    try:
        kind()
    except ValueError as error:
        print(error)
"""
    done = python(site, LISTS + asked)
    assert done.returncode == 0, done.stderr
    for said, taken in zip(done.stdout.splitlines(), TAKEN.values(), strict=True):
        assert f"{taken!r}" in said and distribution(pyproject) in said


@pytest.mark.slow
def test_a_package_that_cannot_be_imported_is_a_reason(tmp_path):
    """The rest of the library works; who asks for it reads why."""
    modules = {name: "import a_package_that_is_nowhere\n" for name in MODULES}
    site = lay_out(tmp_path, examples()["pyproject"], modules)
    done = python(
        site,
        f"""
        {LISTS.strip().replace(chr(10), chr(10) + " " * 8)}
        from flashomni.engine import Recipe
        assert "window" in policies() and "interval" in schedules() and "taylor" in forecasts()
        assert "FluxTransformer2DModel" in adapters()
        from flashomni.policies import make_policy
        make_policy("diagonal")
        """,
    )
    assert done.returncode == 1
    assert "flashomni-extras cannot be imported" in done.stderr
    assert "a_package_that_is_nowhere" in done.stderr


ABACUS = """
from flashomni.dispatch import find, register

ASKED = []


@register("attention", "abacus", rank=90, refuses=lambda call: ["only when asked"] * (not ASKED))
def run(call):
    find("attention", "reference").run(call)
    call.out.mul_(2.0)
"""


def backend_package(folder, module, name="abacus"):
    """A package with one entry point ``flashomni.backends``."""
    head = examples()["pyproject"].partition("[project.entry-points")[0]
    points = f'[project.entry-points."flashomni.backends"]\n{name} = "flashomni_extras.backend"\n'
    return lay_out(folder, head + points, {"backend": module})


# What `flashomni doctor` says, line by line, as it is without a table.
DOCTOR = """
        from flashomni.lab.doctor import text
        print(text())
        """
COMMAND = """
        import sys
        from flashomni.__main__ import main
        sys.argv[1:] = ["doctor"]
        main()
        """


@pytest.mark.slow
def test_a_backend_is_found_chosen_and_shown(tmp_path):
    """By its name and by its rank, for its op alone; doctor lists it, the library's stay."""
    site = backend_package(tmp_path, ABACUS)
    done = python(
        site,
        """
        import torch
        from flashomni.kernels import backends, sparse_attention, sparse_gemm_q
        from flashomni.symbols import Grid, Symbols
        assert backends("attention")[0] == "abacus" and "abacus" not in backends("gemm_q")
        assert {"cpu", "reference"} < set(backends("attention"))
        q, k, v = torch.randn(3, 1, 130, 2, 16)
        symbols = Symbols.dense(Grid(130, 130), 1, 2)
        plain = sparse_attention(q, k, v, symbols)
        import flashomni_extras.backend as ours
        try:
            sparse_attention(q, k, v, symbols, backend="abacus")
            raise SystemExit("was not refused")
        except NotImplementedError as error:
            assert "abacus: only when asked" in str(error)
        ours.ASKED.append(True)
        for got in (sparse_attention(q, k, v, symbols, backend="abacus"),
                    sparse_attention(q, k, v, symbols)):
            torch.testing.assert_close(got, 2 * plain, atol=1e-5, rtol=1e-5)
        x, weight = torch.randn(1, 130, 8), torch.randn(32, 8)
        try:
            sparse_gemm_q(x, weight, None, symbols, backend="abacus")
            raise SystemExit("was not refused")
        except ValueError as error:
            assert "backend must be one of" in str(error)
        """
        + DOCTOR,
    )
    assert done.returncode == 0, done.stderr
    shown = [line.split() for line in done.stdout.splitlines() if "abacus" in line]
    assert shown == [["abacus", "yes", "attention"]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "name", "shown", "reason"),
    [
        ("import a_package_that_is_nowhere", "abacus", "abacus", "a_package_that_is_nowhere"),
        ("{}['no such key']", "abacus", "abacus", "KeyError: 'no such key'"),
        (ABACUS + "\nraise RuntimeError('half way')", "abacus", "abacus", "half way"),
        ("x = 1", "abacus", "abacus", "registers no backend of its name"),
        ("def (", "abacus", "abacus", "SyntaxError"),
        (ABACUS.replace('"abacus"', '"cpu"'), "cpu", "cpu of flashomni-extras", "registered twice"),
        (
            ABACUS.replace('"abacus"', '"cpu"').replace("attention", "gemm_q"),
            "cpu", "cpu of flashomni-extras", "registered twice: one comes with FlashOmni",
        ),
    ],
    ids=["import", "key", "half way", "nothing", "syntax", "taken", "taken in another folder"],
)  # fmt: skip
def test_a_backend_that_fails_is_a_named_refusal(tmp_path, module, name, shown, reason):
    """Whatever its module raises: the library works as before, and doctor says why."""
    site = backend_package(tmp_path, module, name)
    done = python(
        site,
        f"""
        import torch
        from flashomni.kernels import backends, refusals, sparse_attention, sparse_gemm_q
        from flashomni.symbols import Grid, Symbols
        assert "abacus" not in backends("attention") and backends("attention")[-1] == "reference"
        q = torch.randn(1, 130, 2, 16)
        symbols = Symbols.dense(Grid(130, 130), 1, 2)
        assert torch.isfinite(sparse_attention(q, q, q, symbols, backend="cpu")).all()
        sparse_gemm_q(torch.randn(1, 130, 8), torch.randn(32, 8), None, symbols, backend="cpu")
        why = refusals("attention")[{shown!r}]
        assert {reason!r} in why and "flashomni-extras" in why, why
        """
        + DOCTOR
        + COMMAND,
    )
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert any(line.startswith(f"{shown} ") and reason in line for line in lines), lines
