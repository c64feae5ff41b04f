"""What the tests of the studio share: a pipeline as small as they get, and who has it."""

import torch

from flashomni.lab import zoo
from flashomni.studio.outcome import Ask
from flashomni.studio.shelf import Shelf

STEPS = 6
LATE = 20  # seconds after which a thread that should have ended has not
ASK = Ask("a red circle", steps=STEPS)


def small():
    loaded = zoo.random_pipeline("tiny-image", heads=2, head_dim=32, dual=1, single=1)
    loaded.call.update(height=64, width=64, num_inference_steps=STEPS)
    return loaded


def small_shelf():
    """Every name but one is the same small pipeline."""

    def load(name, device, dtype):
        if name == "bad":
            raise ValueError("model 'bad' cannot be loaded: it is bad")
        return small()

    return Shelf("cpu", torch.float32, load)


def last(events):
    return list(events)[-1]
