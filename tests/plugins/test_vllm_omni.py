"""vLLM-Omni itself, on the CPU: its engine finds the plug-in, and its pictures are ours.

`make plugins-test` runs it in an environment with vLLM-Omni; elsewhere it is skipped. vLLM-Omni has
no platform for CPUs: `cpu/` has one, found by vLLM-Omni's own entry point for platforms. Nothing
else is replaced.
"""

from servers import HERE, RECIPE, SAID, bare, environment, needs, pixels, refused, run

pytestmark = needs("vllm_omni")


def generate(folder, recipe, load_format):
    env = environment(recipe, PYTHONPATH=str(HERE / "cpu"))
    return run(HERE / "omni.py", folder, load_format, env=env, cwd=folder)


def test_the_fakes_are_as_vllm_omni_is():
    status, wrote = run(HERE / "contract.py", "vllm_omni", cwd=HERE,
                        env=environment(PYTHONPATH=str(HERE.parent)))  # fmt: skip
    assert status == 0 and wrote.count("same ") == 2, wrote


def test_the_pictures_of_vllm_omni_are_those_of_accelerate(tmp_path):
    """Of two requests with one seed both, bit for bit; the log says what was skipped."""
    dense, expected = bare(tmp_path, "float32", "pil")
    assert dense != expected
    status, wrote = generate(tmp_path, RECIPE, "diffusers")
    assert status == 0, wrote[-4000:]
    assert all(each in wrote for each in SAID), wrote[-4000:]
    assert [pixels(tmp_path / f"{number}.png") for number in range(2)] == [expected] * 2


def test_an_unknown_recipe_ends_the_start(tmp_path):
    status, wrote = generate(tmp_path, "balancd", "diffusers")
    assert status != 0
    refused(wrote, "FLASHOMNI_RECIPE=balancd: recipe must be a preset")


def test_a_pipeline_of_vllm_omni_ends_the_start(tmp_path):
    status, wrote = generate(tmp_path, RECIPE, "default")
    assert status != 0
    refused(wrote, "load format 'default'", "pass --diffusion-load-format diffusers")
