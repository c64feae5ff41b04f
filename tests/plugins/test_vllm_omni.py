"""vLLM-Omni itself, on the CPU: `vllm serve --omni` finds the plug-in, and its pictures are ours.

`make plugins-test` runs it in an environment with vLLM-Omni; elsewhere it is skipped. vLLM-Omni has
no platform for CPUs: `cpu/` has one, found by vLLM-Omni's own entry point for platforms. Nothing
else is replaced.
"""

import servers
from servers import HERE, MODEL, RECIPE, SCRIPTS, bare, environment, pictures, refused, run

pytestmark = servers.needs("vllm_omni")
SERVE = ("serve", MODEL, "--omni", "--dtype", "float32", "--diffusion-load-format")


def told(recipe):
    return environment(recipe, PYTHONPATH=str(HERE / "cpu"))


def test_the_fakes_are_as_vllm_omni_is():
    env = environment(PYTHONPATH=str(HERE.parent))
    status, wrote = run(HERE / "contract.py", "vllm_omni", cwd=HERE, env=env)
    assert status == 0 and wrote.count("same ") == 2, wrote


def test_the_pictures_of_vllm_serve_are_those_of_accelerate(tmp_path):
    """Of two requests with one seed both, bit for bit; the log says what was skipped."""
    dense, expected = bare(tmp_path, "float32", "pil")
    assert dense != expected
    made, wrote = pictures(tmp_path, "vllm", *SERVE, "diffusers", env=told(RECIPE))
    assert made == [expected] * 2
    assert all(each in wrote for each in servers.SAID), wrote[-4000:]


def test_an_unknown_recipe_ends_the_start(tmp_path):
    status, wrote = run(SCRIPTS / "vllm", *SERVE, "diffusers", env=told("balancd"), cwd=tmp_path)
    assert status != 0
    refused(wrote, "FLASHOMNI_RECIPE=balancd: recipe must be a preset")


def test_a_pipeline_of_vllm_omni_ends_the_start(tmp_path):
    status, wrote = run(SCRIPTS / "vllm", *SERVE, "default", env=told(RECIPE), cwd=tmp_path)
    assert status != 0
    refused(wrote, "load format 'default'", "pass --diffusion-load-format diffusers")
