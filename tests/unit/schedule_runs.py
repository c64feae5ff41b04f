"""Generations without a model, for tests of schedules: what they compute of random tensors."""

import torch

from flashomni.engine import StepKind
from flashomni.engine.schedules import Signals, make_schedule

# Settings by which each leaves steps out of the random runs below, and computes some.
SETTINGS = {
    "adaptive": {"tolerance": 0.3},
    "easycache": {"threshold": 0.5, "first": 3},
    "first_block": {"threshold": 0.6, "first": 2},
    "interval": {"interval": 4, "growth": 0.5},
    "magcache": {"threshold": 0.1},
    "ramp": {},
    "steps": {},
    "teacache": {"threshold": 0.9, "coefficients": [0.5, 0.1]},
}


def made(name):
    return make_schedule(name, **SETTINGS[name])


class Run:
    """A generation without a model: random tensors that drift, and what a schedule makes of it."""

    def __init__(self, num_steps, seed=0, errors=None):
        generator = torch.Generator().manual_seed(seed)
        shape = (num_steps, 2, 6, 4)
        self.latents, self.outputs, self.modulated, self.added = (
            torch.randn(shape, generator=generator).cumsum(0) for _ in range(4)
        )
        self.entrance = torch.randn(shape, generator=generator)
        self.errors = errors
        self.num_steps, self.computed, self.reads = num_steps, [], []

    def signals(self, step, memory):
        text = torch.zeros(2, 3, 4)
        known = self.errors is not None and len(self.computed) > 1
        return Signals(
            step,
            self.num_steps,
            tuple(self.computed),
            streams=(text, self.entrance[step] + self.added[step]),
            memory=memory,
            latents=self.latents[step],
            main=1,
            entrance=(text, self.entrance[step]),
            modulated=lambda: self.modulated[step],
            error=(lambda: self.errors[self.computed[-1]]) if known else None,
        )

    def go(self, schedule):
        """The computed steps, as the engine would ask for them."""
        memory, plan = {}, schedule.plan(self.num_steps, 1)
        for step in range(self.num_steps):
            signals = self.signals(step, memory)
            kind = (
                schedule.kind(step, self.num_steps, signals) if plan is None else plan.kinds[step]
            )
            live = kind is not StepKind.DISPATCH
            if schedule.decides and live:
                schedule.watch(schedule.front, signals)
            elif schedule.decides:
                live = schedule.decide(schedule.front, signals)
            if live:
                self.computed.append(step)
                if schedule.learns:
                    schedule.learn(self.outputs[step], signals)
        return self.computed
