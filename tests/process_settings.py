"""What torch and diffusers keep for a whole process: a test leaves it as it was."""

import sys

import pytest
import torch


def process_settings():
    """What torch and diffusers keep for the whole process, by name: any of it changes last bits."""
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    registry = getattr(dispatch, "_AttentionBackendRegistry", None)
    attention = getattr(registry, "_active_backend", None)
    return {
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "float32 products": torch.get_float32_matmul_precision(),
        "gradients": torch.is_grad_enabled(),
        "diffusers' attention": getattr(attention, "value", "native"),
    }


@pytest.fixture(autouse=True)
def leaves_the_process_as_it_was():
    """Or whatever test comes behind it in the same process gets other last bits, now and then."""
    before = process_settings()
    yield
    assert process_settings() == before


@pytest.fixture
def diffusers_attention():
    """A test may choose diffusers' attention: that of the whole process goes back behind it.

    A model's ``reset_attention_backend`` leaves the process with what it had set.
    """
    from diffusers.models.attention_dispatch import attention_backend

    with attention_backend("native"):
        yield
