"""Scripts beside the package still start, and the campaigns of random cases find nothing here."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(
    [
        *(path for path in (ROOT / "tools").glob("*.py") if path.stem != "docs_site"),  # a hook
        *(ROOT / "tests" / "fuzz").glob("*.py"),
        *(path for path in (ROOT / "studies").glob("*.py") if not path.stem.startswith("_")),
        ROOT / "training" / "score.py",
        ROOT / "training" / "train.py",
        ROOT / "training" / "further.py",
        ROOT / "training" / "evaluate.py",
        ROOT / "training" / "ladder.py",
    ]
)


def script(path, *arguments):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(path), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)


@pytest.fixture
def as_script(monkeypatch):
    """Modules of tests and scripts are imported anew, from where a program of its own finds them.

    Such a program would import torch for two seconds to print a few lines.
    """

    def prepare(path):
        monkeypatch.setattr(sys, "argv", [str(path), "--help"])
        away = [folder for folder in sys.path if Path(folder).is_relative_to(ROOT / "tests")]
        found = [str(path.parent), *(folder for folder in sys.path if folder not in away)]
        monkeypatch.setattr(sys, "path", found)
        for name in list(sys.modules):
            if _is_script(name):
                monkeypatch.delitem(sys.modules, name)

    known = set(sys.modules)
    yield prepare
    for name in filter(_is_script, set(sys.modules) - known):
        del sys.modules[name]


def _is_script(name):
    """Whether a module is of tests or scripts; an environment may lie in the checkout too."""
    file = Path(getattr(sys.modules[name], "__file__", None) or "/")
    inside = file.is_relative_to(ROOT) and not file.is_relative_to(sys.prefix)
    return inside and not name.startswith("flashomni")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_script_starts(path, as_script, capsys):
    """Nothing it imports has moved."""
    as_script(path)
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(path), run_name="__main__")
    assert done.value.code in (0, None)
    assert "usage:" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fuzz_attention", "fuzz_gemm"])
def test_random_cases_hold_on_the_cpu(name):
    """A few cases of each campaign."""
    path = ROOT / "tests" / "fuzz" / f"{name}.py"
    jobs = ["--jobs", 1] if name == "fuzz_gemm" else []
    done = script(path, "--device", "cpu", "--backend", "cpu", "--count", 8, "--seed", 1, *jobs)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
