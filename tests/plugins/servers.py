"""Both servers are started as a user would, on the CPU, with the trained tiny-image.

In the environments of `make plugins-test`; nothing of a server is imported by a test itself.
"""

import base64
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
from flashomni_assets import folder

HERE = Path(__file__).resolve().parent
SCRIPTS = Path(sys.executable).parent
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


def pictures(folder, *command, env, **body):
    """Two pictures of one seed that a server makes over HTTP, and its log.

    Args:
        folder: where both go.
        command: that starts the server, without its port.
        env: of the server.
        body: of the requests, besides prompt, seed, size and steps.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, log, made = f"http://127.0.0.1:{port}", folder / "server.log", []
    place = ("--host", "127.0.0.1", "--port", str(port))
    with log.open("w") as file:
        server = subprocess.Popen(
            [SCRIPTS / command[0], *command[1:], *place],
            env=env,
            cwd=folder,
            stdout=file,
            stderr=file,
        )
    try:
        _until_healthy(server, f"{url}/health", log)
        for number in range(2):
            path = folder / f"{number}.png"
            path.write_bytes(_post(f"{url}/v1/images/generations", **body))
            made.append(pixels(path))
    finally:
        server.terminate()
        server.wait(60)
    return made, log.read_text()


def _until_healthy(server, url, log):
    while server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5) as reply:
                if reply.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(1)  # it imports for half a minute
    raise AssertionError(log.read_text()[-4000:])


def _post(url, **body):
    body |= {"prompt": PROMPT, "seed": SEED, "size": f"{SIDE}x{SIDE}"}
    body |= {"num_inference_steps": STEPS, "response_format": "b64_json"}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=300) as reply:
        return base64.b64decode(json.load(reply)["data"][0]["b64_json"])


def pixels(path):
    from PIL import Image

    with Image.open(path) as image:
        assert image.size == (SIDE, SIDE)
        return image.convert("RGB").tobytes()


def refused(wrote, *words):
    """What the operator reads: the reason, and what to do."""
    for each in (*words, "Unset it to serve without FlashOmni"):
        assert each in wrote, wrote[-4000:]
