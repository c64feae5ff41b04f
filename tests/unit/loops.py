"""A pipeline of one's own, for tests of what an engine knows of its steps."""

import torch

from conftest import call

CACHING = "taylorseer:interval=3,warmup=0.2"


class Loop:
    """A pipeline of one's own: a scheduler, a transformer, a loop over the timesteps."""

    def __init__(self, transformer, scheduler, inputs):
        self.transformer, self.scheduler, self.inputs = transformer, scheduler, inputs

    def __call__(self, steps=8, calls=1):
        self.scheduler.set_timesteps(steps)
        outputs, latents = [], self.inputs["hidden_states"]
        for timestep in self.scheduler.timesteps:
            for _ in range(calls):
                output = call(self.transformer, {**self.inputs, "hidden_states": latents})
            outputs.append(output)
            self.scheduler.step(output[..., :1], timestep, latents[..., :1])
            latents = latents - 0.05 * torch.nn.functional.pad(
                output, (0, latents.shape[-1] - output.shape[-1])
            )
        return torch.stack(outputs)


def euler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler()


def kinds(engine):
    return "".join(step["kind"][0] for step in engine.report().steps)
