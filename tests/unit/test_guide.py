"""The guide in CONTRIBUTING.md is true: each example runs as it stands there, from one file."""

import re
import tomllib

import pytest
from guide import ROOT, examples, run

EXERCISES = {
    "policy": """
        import torch
        from flashomni.policies import make_policy, AttentionSite
        from flashomni.symbols import Grid
        from flashomni.engine import Recipe
        grid = Grid(2000, 2000, (0, 77))
        q = torch.randn(1, 2000, 2, 16)
        symbols = make_policy("diagonal", reach=0.1)(AttentionSite.alone(q, q, grid))
        mask = symbols.kv_mask()[0, 1]
        assert mask[0].all() and mask[:, 0].all() and not mask[8].all() and mask[8, 8]
        recipe = Recipe.of("diagonal:reach=.3")
        assert Recipe.from_dict(recipe.to_dict()) == recipe and recipe.policy.reach == 0.3
        assert type(recipe.policy).__doc__.startswith("First line of the docstring")
    """,
    "schedule": """
        from flashomni.engine.schedules import StepKind, make_schedule
        from flashomni.engine import Recipe
        kinds = make_schedule("early", part=0.5).plan(8, 1).kinds
        D, F, U = StepKind.DISPATCH, StepKind.FULL, StepKind.UPDATE
        assert kinds == (F, F, F, F, U, D, U, D), kinds
        recipe = Recipe.of("balanced", schedule="early")
        assert Recipe.from_dict(recipe.to_dict()) == recipe and recipe.schedule.part == 0.4
    """,
    "forecast": """
        from flashomni.engine.forecasts import forecasts
        from flashomni.engine import Recipe
        weights = forecasts()["damped"]
        assert weights([3], 5) == [1.0]
        assert weights([1, 3], 5) == [-0.5, 1.5] and weights([0, 1, 3], 4) == [0.0, -0.25, 1.25]
        recipe = Recipe.of("balanced", forecast="damped")
        assert Recipe.from_dict(recipe.to_dict()) == recipe and recipe.forecast.name == "damped"
    """,
    "adapter": """
        import torch
        import flashomni
        from flashomni.models import adapters
        model, inputs = adapters()["TinyDiT"].tiny()
        model.requires_grad_(False)
        stock = model(**inputs)
        with torch.no_grad():
            with flashomni.accelerate(model, "lossless") as engine:
                engine.step(0, 1)
                torch.testing.assert_close(model(**inputs), stock, atol=1e-5, rtol=1e-5)
            recipe = flashomni.Recipe.of("topk:kv_density=1,interval=2,warmup=0")
            with flashomni.accelerate(model, recipe) as engine:
                for step in range(4):
                    engine.step(step, 4)
                    torch.testing.assert_close(model(**inputs), stock, atol=1e-5, rtol=1e-5)
                kinds = [step["kind"] for step in engine.report().steps]
                assert kinds[1] == "dispatch", kinds
        assert torch.equal(model(**inputs), stock)
    """,
    "learned": """
        import torch
        import flashomni
        from example import blocks, engine, model
        from flashomni.models.generic.declared import DECLARED
        latents, text = torch.randn(1, 300, 32), torch.randn(1, 77, 32)
        engine.remove()
        model.requires_grad_(False)
        stock = model(latents, text)
        said = {"lists": ["layers"], "text": "first", "text_from": "text"}
        tiles = flashomni.Recipe.of("balanced", policy="flashomni", tau_q=0.9, tau_kv=0.0,
                                    degrade_below=0.5, policy_without_text="cached")
        for tier, line, given in (
            ("generic", None, None), ("declared", said, None), ("declared", None, blocks),
        ):
            if line is not None:
                DECLARED["Mine"] = line  # what a line of the table does
            engine = flashomni.accelerate(model, tiles, blocks=given)
            with torch.no_grad():
                for step in range(28):
                    engine.step(step, 28)
                    got = model(latents, text)
                    torch.testing.assert_close(got, stock, atol=1e-5, rtol=1e-5)
            report = engine.report()
            assert report.tier == tier and report.flops_skipped > 0, str(report)
            assert "layers: attention of 4 of 4 blocks on FlashOmni's op" in report.notes
            cached = any("dispatch" in step["layer_kinds"] for step in report.steps)
            assert cached == (tier == "declared"), tier  # which needs to know where the text is
            engine.remove()
            DECLARED.pop("Mine", None)
            assert torch.equal(model(latents, text), stock)
    """,
}


@pytest.mark.parametrize(
    "name",
    [
        name if name == "policy" else pytest.param(name, marks=pytest.mark.slow)
        for name in EXERCISES
    ],
)
def test_an_example_runs_as_it_stands(name, tmp_path):
    """Imported from a file of its own, in a process of its own; then used."""
    (tmp_path / "example.py").write_text(examples()[name], encoding="utf-8")
    lines = EXERCISES[name].replace("\n        ", "\n")
    done = run("-c", f"import example\n{lines}", path=[tmp_path])
    assert done.returncode == 0, done.stderr


def test_every_example_is_exercised():
    """The package's metadata is exercised where the package is built."""
    assert set(examples()) == {*EXERCISES, "pyproject"}


def test_paths_that_the_guide_names_exist():
    """A guide to files that have moved is worse than none."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:src/|tests/|studies/|lab/|models/|kernels/)[\w/.]*[\w/])`", text))
    assert len(named) > 8
    for name in named:
        place = name if name.startswith(("src/", "tests/", "studies/")) else f"src/flashomni/{name}"
        assert "NAME" in name or (ROOT / place).exists(), name


def test_every_dependency_has_its_line():
    """The table names what pyproject.toml asks for, and nothing else."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    asked = {re.split(r"[<>=;\[ ]", line)[0] for lines in lists for line in lines}
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w, -]+?) \| .* \|$", text[text.index("## Depend") :], re.M)
    named = [name for row in rows for name in row.split(", ")]
    assert sorted(named) == sorted({*asked, "package"} - {"flashomni"})
