"""Sparse methods that are part of a model's training: they are no policy for a model without it."""

from __future__ import annotations

TRAINED = {
    "vsa": "VSA (arXiv 2505.13389) trains the model with its coarse attention and the gate on it",
    "sla": "SLA (arXiv 2509.24006) trains the projection of its linear attention, and the model",
    "sla2": "SLA2 trains its router and the mixture of its two branches",
    "spargeattn2": "SpargeAttn2 trains the model with its masks, by distillation",
    "vmoba": "VMoBA (arXiv 2506.23858) trains the model with its mixture of blocks",
    "blade": "BLADE (arXiv 2508.10774) distils few steps and sparse attention together",
}


def refuse_trained(name: str) -> None:
    """Refuse the name of a method that needs weights that it was trained with.

    Raises:
        NotImplementedError: it is one; the message says why.
    """
    why = TRAINED.get(name)
    if why is not None:
        raise NotImplementedError(
            f"{name} cannot be put on a model that was trained without it: {why}. Methods without "
            "training are policies: spargeattn, xattention, jenga, draft, svg, sta, radial, ..."
        )
