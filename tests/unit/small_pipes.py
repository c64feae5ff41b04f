"""The bundled pipelines with few random weights, and small pictures."""

import dataclasses

from flashomni.lab import zoo

SIZES = {
    "tiny-image": {"height": 64, "width": 64, "num_inference_steps": 8},
    "tiny-video": {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 8},
}


def small(name="tiny-image"):
    loaded = zoo.random_pipeline(name, heads=2, head_dim=32, dual=2, single=2)
    return dataclasses.replace(loaded, call={**loaded.call, **SIZES[name]})
