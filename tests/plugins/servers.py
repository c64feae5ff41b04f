"""Both servers are started as a user would, on the CPU, with the trained tiny-image.

In the environments of `make plugins-test`; nothing of a server is imported by a test itself.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from flashomni_assets import folder

HERE = Path(__file__).resolve().parent
MODEL = folder("tiny-image")
RECIPE = "balanced"
PROMPT = "a large red circle left of a small blue square on a green checker floor"
STEPS, SIDE, SEED = 12, 128, 1
SAID = ("FluxTransformer2DModel accelerated with recipe balanced", "of the blocks cached whole")


def needs(package):
    """Marks of a test that runs in that package's environment."""
    missing = find_spec(package) is None
    reason = f"{package} is not installed: `make plugins-test` has an environment"
    return [
        pytest.mark.plugins,
        pytest.mark.timeout(900),
        pytest.mark.skipif(missing, reason=reason),
    ]


def environment(recipe=None, **more):
    """That of a server; one thread, so that sums have one order."""
    env = {key: value for key, value in os.environ.items() if key != "FLASHOMNI_RECIPE"}
    if recipe is not None:
        env["FLASHOMNI_RECIPE"] = recipe
    return env | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more


def run(*command, env, cwd):
    """``(exit status, all that it wrote)``."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=env,
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=600,
    )
    return done.returncode, done.stdout


def bare(folder, dtype, kind, guidance=None):
    """The pictures of the pipeline itself, dense and accelerated, in this environment."""
    status, wrote = run(HERE / "bare.py", folder, dtype, kind, guidance or "", env=environment(),
                        cwd=folder)  # fmt: skip
    assert status == 0, wrote
    return pixels(folder / "dense.png"), pixels(folder / f"{RECIPE}.png")


def pixels(path):
    from PIL import Image

    with Image.open(path) as image:
        assert image.size == (SIDE, SIDE)
        return image.convert("RGB").tobytes()


def refused(wrote, *words):
    """What the operator reads: the reason, and what to do."""
    for each in (*words, "Unset it to serve without FlashOmni"):
        assert each in wrote, wrote[-4000:]
