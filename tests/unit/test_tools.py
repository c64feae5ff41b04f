"""Scripts beside the package still start, and the campaigns of random cases find nothing here."""

import os
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


@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_script_starts(path):
    """Nothing it imports has moved."""
    done = script(path, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


@pytest.mark.parametrize(
    "name", [pytest.param("fuzz_attention", marks=pytest.mark.slow), "fuzz_gemm"]
)
def test_random_cases_hold_on_the_cpu(name):
    """A few cases of each campaign."""
    path = ROOT / "tests" / "fuzz" / f"{name}.py"
    jobs = ["--jobs", 1] if name == "fuzz_gemm" else []
    done = script(path, "--device", "cpu", "--backend", "cpu", "--count", 8, "--seed", 1, *jobs)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
