"""SGLang itself, on the CPU: `sglang serve` finds the plug-in, and its pictures are ours.

`make plugins-test` runs it in an environment with SGLang; elsewhere it is skipped.
"""

import servers
from servers import HERE, MODEL, RECIPE, SCRIPTS, bare, environment, pictures, refused, run

pytestmark = servers.needs("sglang")
GUIDANCE = 2.5


def test_the_fakes_are_as_sglang_is():
    env = environment(PYTHONPATH=str(HERE.parent))
    status, wrote = run(HERE / "contract.py", "sglang", cwd=HERE, env=env)
    assert status == 0 and wrote.count("same ") == 5, wrote


def test_the_pictures_of_sglang_serve_are_those_of_accelerate(tmp_path):
    """Of two requests with one seed both, bit for bit; the log says what was skipped."""
    dense, expected = bare(tmp_path, "bfloat16", "pt", GUIDANCE)
    assert dense != expected
    # Its warm-up would be a picture of 1024 x 1024.
    command = ("sglang", "serve", "--model-path", MODEL, "--backend", "diffusers")
    made, wrote = pictures(
        tmp_path,
        *command,
        "--warmup-mode",
        "off",
        env=environment(RECIPE),
        guidance_scale=GUIDANCE,
        output_format="png",
        generator_device="cpu",
    )
    assert made == [expected] * 2
    assert all(each in wrote for each in servers.SAID), wrote[-4000:]


def generate(folder, recipe, *arguments):
    small = ["--prompt", "a", "--num-inference-steps", "2", "--height", "64", "--width", "64"]
    command = (SCRIPTS / "sglang", "generate", "--model-path", MODEL, *small, *arguments)
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
