"""The attention that the user has chosen in diffusers: on a model it is kept, of the process named.

``DIFFUSERS_ATTN_BACKEND``, the context ``attention_backend`` and ``set_attention_backend`` of *any*
model choose one for the whole process, and ``reset_attention_backend`` leaves it. So that may be
another model's, or nobody's wish any more, while ``accelerate`` was asked for: FlashOmni's runs,
and log and report say so.
"""

from __future__ import annotations

import logging
import sys

from torch import nn

log = logging.getLogger("flashomni")
DEFAULT = "native"  # what diffusers takes where nothing is chosen


def kept_backend(model: nn.Module) -> str | None:
    """The attention backend that the user has set on a model, which is kept; or ``None``."""
    return next(filter(None, map(_set_on, model.modules())), None)


def process_backend() -> str | None:
    """The attention backend that is chosen for the whole process; ``None`` for the default."""
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    registry = getattr(dispatch, "_AttentionBackendRegistry", None)
    name = _name(getattr(registry, "_active_backend", None))
    return None if name == DEFAULT else name


class OfProcess:
    """Says so where the process has an attention that is not set on the model.

    Args:
        model: the transformer.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._note = model, ""
        self._said: set[str] = set()

    def look(self) -> None:
        """A generation starts."""
        name = process_backend()
        self._note = "" if name is None or kept_backend(self._model) else _told(name)
        if self._note and self._note not in self._said:
            self._said.add(self._note)
            log.warning("%s: %s", type(self._model).__name__, self._note)

    def notes(self) -> list[str]:
        """For the report of the generation that started last."""
        return [self._note] if self._note else []


def _told(name: str) -> str:
    return (
        f"attention backend {name!r} is chosen for the whole process, not on this transformer: "
        f"FlashOmni's attention runs wherever it can, {name!r} in all that stays diffusers' own; "
        f"transformer.set_attention_backend({name!r}) before accelerate keeps it"
    )


def _set_on(module: nn.Module) -> str | None:
    return _name(getattr(getattr(module, "processor", None), "_attention_backend", None))


def _name(backend: object) -> str | None:
    return None if backend is None else str(getattr(backend, "value", backend))
