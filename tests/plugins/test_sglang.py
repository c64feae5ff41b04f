"""SGLang itself, on the CPU: `sglang serve` finds the plug-in, and its pictures are ours.

`make plugins-test` runs it in an environment with SGLang; elsewhere it is skipped.
"""

import base64
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import servers
from servers import HERE, RECIPE, bare, environment, pixels, refused, run

pytestmark = servers.needs("sglang")
COMMAND = Path(sys.executable).parent / "sglang"
GUIDANCE = 2.5


def test_the_fakes_are_as_sglang_is():
    status, wrote = run(HERE / "contract.py", "sglang", cwd=HERE,
                        env=environment(PYTHONPATH=str(HERE.parent)))  # fmt: skip
    assert status == 0 and wrote.count("same ") == 5, wrote


def test_the_pictures_of_sglang_serve_are_those_of_accelerate(tmp_path):
    """Of two requests with one seed both, bit for bit; the log says what was skipped."""
    dense, expected = bare(tmp_path, "bfloat16", "pt", GUIDANCE)
    assert dense != expected
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "server.log"
    # Its warm-up would be a picture of 1024 x 1024.
    options = f"--backend diffusers --warmup-mode off --host 127.0.0.1 --port {port}".split()
    command = [COMMAND, "serve", "--model-path", servers.MODEL, *options]
    with log.open("w") as file:
        server = subprocess.Popen(
            command, env=environment(RECIPE), cwd=tmp_path, stdout=file, stderr=file
        )
    try:
        until_healthy(server, f"http://127.0.0.1:{port}/health", log)
        for number in range(2):
            path = tmp_path / f"{number}.png"
            path.write_bytes(post(f"http://127.0.0.1:{port}/v1/images/generations"))
            assert pixels(path) == expected
    finally:
        server.terminate()
        server.wait(60)
    wrote = log.read_text()
    assert all(each in wrote for each in servers.SAID), wrote[-4000:]


def until_healthy(server, url, log):
    while server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5) as reply:
                if reply.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(1)  # it imports for half a minute
    raise AssertionError(log.read_text()[-4000:])


def post(url):
    body = {
        "prompt": servers.PROMPT,
        "seed": servers.SEED,
        "size": f"{servers.SIDE}x{servers.SIDE}",
        "num_inference_steps": servers.STEPS,
        "guidance_scale": GUIDANCE,
        "response_format": "b64_json",
        "output_format": "png",
        "generator_device": "cpu",
    }
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=300) as reply:
        return base64.b64decode(json.load(reply)["data"][0]["b64_json"])


def generate(folder, recipe, *arguments):
    small = ["--prompt", "a", "--num-inference-steps", "2", "--height", "64", "--width", "64"]
    command = (COMMAND, "generate", "--model-path", servers.MODEL, *small, *arguments)
    return run(*command, env=environment(recipe), cwd=folder)


def test_an_unknown_recipe_ends_the_start(tmp_path):
    """SGLang logs plug-ins that fail to register and serves on; ours fails where a model loads."""
    status, wrote = generate(tmp_path, "balancd", "--backend", "diffusers")
    assert status != 0
    refused(wrote, "FLASHOMNI_RECIPE=balancd: recipe must be a preset")


def test_a_pipeline_of_sglang_ends_the_start(tmp_path):
    own = ("--backend", "sglang", "--pipeline-class-name", "FluxPipeline")
    status, wrote = generate(tmp_path, RECIPE, *own)
    assert status != 0
    refused(wrote, "FluxPipeline is SGLang's own", "pass --backend diffusers")
