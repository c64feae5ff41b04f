"""Small random instances of diffusers' transformer classes, for tests of models without an adapter.

Some have one by now: the definition of whole-layer caching holds for them as well.

``TINY`` says how to make each: its configuration, and the arguments of one call. Sequences are
ragged where the class allows it. Nothing is built before it is asked for.
"""

import torch
from tiny_audio_and_more import MORE
from tiny_images import IMAGES
from tiny_videos import VIDEOS

TINY = {**IMAGES, **VIDEOS, **MORE}  # class -> (configuration, arguments of one call)


def build(name):
    """A model with every gate filled, and the arguments of one call."""
    import diffusers

    config, inputs = TINY[name]
    torch.manual_seed(0)
    model = getattr(diffusers, name)(**config).eval()
    fill_gates(model)
    return model, inputs()


def fill_gates(model):
    """Random values for what is initialised to zero, larger ones elsewhere: blocks must matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.3)
            elif parameter.ndim == 2:
                parameter.mul_(1.5)


def output(model, inputs):
    """The first tensor of what the model returns."""
    found = model(**inputs, return_dict=False)
    while not isinstance(found, torch.Tensor):
        found = found[0]
    return found
