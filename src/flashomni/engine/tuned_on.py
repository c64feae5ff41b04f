"""What a recipe was tuned on: calibration holds for one model, one length and one size."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from flashomni.policies import check_int


@dataclass(frozen=True, kw_only=True)
class TunedOn:
    """What a recipe was tuned on; JSON values, kept in the recipe.

    Args:
        model: class of the transformer.
        fingerprint: of its configuration and number of weights, see :func:`fingerprint`.
        num_steps: of the generations.
        latents: shape of the latents that the transformer got.
        prompts: hash of the prompts.
        count: how many prompts there were.
        ramp: the schedule that it had to beat, and did.
        gain_db: by how much, in the mean over prompts that it had not seen.

    Raises:
        ValueError: a value is of the wrong kind.
    """

    model: str
    fingerprint: str
    num_steps: int
    latents: tuple[int, ...]
    prompts: str
    count: int
    ramp: str = ""
    gain_db: float = 0.0

    def __post_init__(self) -> None:
        for name in ("model", "fingerprint", "prompts", "ramp"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"tuned.{name} must be a string, got {getattr(self, name)!r}")
        for name in ("num_steps", "count"):
            check_int(f"tuned.{name}", getattr(self, name), 1, 1_000_000)
        sizes = self.latents if isinstance(self.latents, (list, tuple)) else (None,)
        if not all(isinstance(size, int) and not isinstance(size, bool) for size in sizes):
            raise ValueError(f"tuned.latents must be a list of sizes, got {self.latents!r}")
        object.__setattr__(self, "latents", tuple(sizes))
        if isinstance(self.gain_db, bool) or not isinstance(self.gain_db, (int, float)):
            raise ValueError(f"tuned.gain_db must be a number, got {self.gain_db!r}")

    @classmethod
    def load(cls, value: Any) -> TunedOn | None:
        """Of JSON values.

        Raises:
            ValueError: a key is missing or unknown, or a value not allowed.
        """
        if value is None or isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise ValueError(f"tuned must be an object or null, got {value!r}")
        try:
            return cls(**value)
        except TypeError as error:
            raise ValueError(f"tuned: {error}") from error

    def elsewhere(
        self, model: nn.Module, num_steps: int, latents: Sequence[int] | None
    ) -> list[str]:
        """How a generation differs from what it was tuned on, a clause each.

        Args:
            model: the transformer.
            num_steps: of the generation.
            latents: shape that it gets; ``None`` where it is not known.
        """
        found = []
        if self.model != type(model).__name__:
            found.append(f"it was tuned on {self.model}, this is {type(model).__name__}")
        elif self.fingerprint != fingerprint(model):
            found.append("the transformer has another configuration or other weights beside it")
        if num_steps != self.num_steps:
            found.append(f"it was tuned for {self.num_steps} steps, these are {num_steps}")
        if latents is not None and tuple(latents) != self.latents:
            found.append(f"it was tuned for latents {list(self.latents)}, these are {[*latents]}")
        return found


def fingerprint(model: nn.Module) -> str:
    """Hash of a transformer's configuration, and how many weights it has (a LoRA adds some)."""
    config = {k: v for k, v in dict(getattr(model, "config", {})).items() if k[:1] != "_"}
    count = sum(parameter.numel() for parameter in model.parameters())
    text = json.dumps([type(model).__name__, config, count], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def prompts_hash(prompts: Sequence[str]) -> str:
    """Hash of a list of prompts."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:16]
