"""``python omni.py FOLDER LOAD_FORMAT``: pictures of vLLM-Omni's own engine, into the folder."""

import sys
from pathlib import Path

from servers import MODEL, PROMPT, SEED, SIDE, STEPS

if __name__ == "__main__":
    from vllm_omni.entrypoints.omni import Omni
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams

    folder, load_format = sys.argv[1:]
    omni = Omni(model=str(MODEL), diffusion_load_format=load_format, dtype="float32")
    for number in range(2):
        told = OmniDiffusionSamplingParams(
            seed=SEED, num_inference_steps=STEPS, height=SIDE, width=SIDE
        )
        (made,) = omni.generate(PROMPT, told)
        made.images[0].save(Path(folder) / f"{number}.png")
    omni.close()
