"""What a server is started with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashomni.engine import Recipe

SEPARATOR = ";"  # between entries of a list that is given as text: recipes have commas


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Arguments of ``serve run flashomni.serve:app``.

    Args:
        model: ``tiny-image``, ``tiny-video``, ``tiny-wan``, a folder of diffusers, or a Hub id.
        recipe: of requests that name none.
        recipes: others that a request may name; as text ``fora;balanced:interval=3``.
        loras: folders that a request may name; as text ``name=folder;name=folder``.
        replicas: how many copies of the model serve.
        gpus_per_replica: cards that generate one picture together; 0 is the CPU.
        ranks: processes that generate one picture together on the CPU; on GPUs it is the cards.
        cpus: cores for each process of a replica.
        dtype: of the weights; ``bfloat16`` on a GPU, ``float32`` on the CPU, by default.
        queue: requests that wait for a replica; one more is answered 503.
        in_flight: requests that a replica holds: what generates, and what waits to be next while
            the last one is encoded.
        max_batch: requests of one shape that may be generated as one batch. 1 by default.
        exact: batch only where it was seen to give the same bits as each request alone.
        max_steps: the most denoising steps that a request may ask for.
        max_pixels: the most pixels, width times height times frames, what a request leaves out
            counted as the model makes it; what the model makes unasked is allowed in any case.
        max_images: the most pictures of one request.
        warm_up: steps of a generation before a replica says that it is ready.
        retries: how often a request is given to another replica when the one that held it died.
        fps: frames a second, of videos.

    Raises:
        ValueError: a value is not allowed.
    """

    model: str = "tiny-image"
    recipe: str = "balanced"
    recipes: tuple[str, ...] = ()
    loras: Mapping[str, str] = field(default_factory=dict)
    replicas: int = 1
    gpus_per_replica: int = 0
    ranks: int = 1
    cpus: float = 1.0
    dtype: str = ""
    queue: int = 64
    in_flight: int = 2
    max_batch: int = 1
    exact: bool = True
    max_steps: int = 100
    max_pixels: int = 2**22
    max_images: int = 8
    warm_up: int = 1
    retries: int = 1
    fps: int = 12

    def __post_init__(self) -> None:
        least = {"gpus_per_replica": 0, "queue": 0, "warm_up": 0, "retries": 0}
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if each.type == "int" and value < least.get(each.name, 1):
                raise ValueError(
                    f"{each.name} must be at least {least.get(each.name, 1)}, got {value}"
                )
        if self.cpus <= 0:
            raise ValueError(f"cpus must be more than 0, got {self.cpus}")
        if self.dtype not in ("", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {self.dtype!r}")
        if self.ranks > 1 and self.gpus_per_replica not in (0, self.ranks):
            raise ValueError(
                f"ranks is for the CPU; on GPUs there is one a card: gpus_per_replica is "
                f"{self.gpus_per_replica}, ranks {self.ranks}"
            )
        if self.size > 1 and self.max_batch > 1:
            raise ValueError("max_batch must be 1 where several cards generate one picture")
        for name in self.allowed:
            Recipe.of(name)
        for name, folder in self.loras.items():
            if not Path(folder).is_dir():
                raise ValueError(f"loras: {name} must be a folder, got {folder!r}")

    @property
    def allowed(self) -> tuple[str, ...]:
        """The recipes that a request may name, the default first."""
        return tuple(dict.fromkeys((self.recipe, *self.recipes)))

    @property
    def size(self) -> int:
        """Processes that generate one picture together."""
        return max(self.gpus_per_replica, self.ranks)

    @property
    def device(self) -> str:
        return "cuda" if self.gpus_per_replica else "cpu"

    @classmethod
    def of(cls, args: Mapping[str, Any]) -> Settings:
        """Settings as a command line or a configuration file gives them.

        Raises:
            ValueError: a name is unknown, or a value is not allowed.
        """
        known = {each.name: each for each in dataclasses.fields(cls)}
        wrong = sorted(set(args) - set(known))
        if wrong:
            raise ValueError(f"settings are {', '.join(known)}; got {', '.join(map(repr, wrong))}")
        return cls(**{name: _read(name, known[name].type, value) for name, value in args.items()})


def _read(name: str, kind: Any, value: Any) -> Any:
    """A value of a field's type, from text or from JSON."""
    readers: dict[str, Any] = {"str": str, "int": _whole, "float": float, "bool": _flag}
    try:
        if kind in readers:
            return readers[kind](value)
        return _mapping(value) if kind.startswith("Mapping") else tuple(_listed(value))
    except (TypeError, ValueError, LookupError) as error:
        what = {"int": "a whole number", "float": "a number", "bool": "true or false"}.get(
            kind, "name=folder;name=folder" if kind.startswith("Mapping") else "a;b;c"
        )
        raise ValueError(f"{name} must be {what}, got {value!r}") from error


def _whole(value: Any) -> int:
    if isinstance(value, (bool, float)):
        raise ValueError("not a whole number")
    return int(value)


def _flag(value: Any) -> bool:
    return {"true": True, "1": True, "false": False, "0": False}[str(value).lower()]


def _listed(value: Any) -> list[str]:
    parts = value.split(SEPARATOR) if isinstance(value, str) else value
    return [str(part).strip() for part in parts if str(part).strip()]


def _mapping(value: Any) -> dict[str, str]:
    if isinstance(value, Mapping):
        return {str(name): str(folder) for name, folder in value.items()}
    pairs = (part.partition("=") for part in _listed(value))
    found = {name.strip(): folder.strip() for name, _, folder in pairs}
    if not all(found) or not all(found.values()):
        raise ValueError("not name=folder")
    return found
