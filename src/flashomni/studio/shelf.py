"""The pipelines that are loaded: one for all pages that use it, gone when none does."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from flashomni.lab import zoo
from flashomni.models import transformers_of
from flashomni.studio.turns import Turns

Load = Callable[..., zoo.Loaded]


class Shelved:
    """A pipeline that is loaded.

    Attributes:
        name: what was asked for.
        loaded: the pipeline and how to call it.
        turns: of those who generate on its device: one at a time, so that times are right.
        warm: seconds of a dense step, by what has run once already.
    """

    def __init__(self, name: str, loaded: zoo.Loaded, turns: Turns) -> None:
        self.name, self.loaded, self.turns = name, loaded, turns
        self.warm: dict[str, float] = {}

    @property
    def num_steps(self) -> int:
        """That its call asks for."""
        return int(self.loaded.call.get("num_inference_steps", 50))

    def says(self) -> str:
        """What it is, in a line."""
        pipe = self.loaded.pipe
        classes = [type(model).__name__ for model in transformers_of(pipe).values()]
        words = [
            type(pipe).__name__,
            *classes,
            str(pipe.device),
            str(pipe.dtype).rpartition(".")[2],
        ]
        if not self.loaded.trained:
            words.append("random weights: the picture is noise")
        return " \N{MIDDLE DOT} ".join(words)


class Shelf:
    """Loads pipelines, each once.

    Args:
        device: that they are put on.
        dtype: of their weights.
        load: :func:`flashomni.lab.zoo.load`, or the like.
        only: names that may be taken; any if left out. A page that strangers reach needs them: it
            would have the machine load whatever they name.
    """

    def __init__(
        self,
        device: torch.device | str,
        dtype: torch.dtype,
        load: Load = zoo.load,
        only: Sequence[str] | None = None,
    ) -> None:
        self.only = None if only is None else tuple(name.strip() for name in only)
        self.device, self.dtype = torch.device(device), dtype
        self.turns = Turns()
        self._load = load
        self._there: weakref.WeakValueDictionary[str, Shelved] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()

    def take(self, name: str) -> Shelved:
        """The pipeline of that name, folder or Hub id. Keep it: it stays while somebody does.

        Raises:
            ValueError: there is none, it cannot be loaded, it has no transformer, or it is not one
                of those that may be taken.
            OSError, RuntimeError, MemoryError: the device, or the machine, has no room for it.
        """
        name = name.strip()
        if not name:
            raise ValueError(
                f"model must be {', '.join(zoo.BUNDLED)}, a folder or a Hub id, got ''"
            )
        if self.only is not None and name not in self.only:
            raise ValueError(
                f"model must be {', '.join(self.only)}, which this page was started with, got "
                f"{name!r}"
            )
        if name not in zoo.BUNDLED and name.startswith("~"):
            name = str(Path(name).expanduser())
        found = self._there.get(name)
        if found is not None:
            return found  # while another one is loaded, which may take minutes
        with self._lock:
            found = self._there.get(name)
            if found is None:
                loaded = self._load(name, self.device, self.dtype)
                if not transformers_of(loaded.pipe):
                    raise ValueError(
                        f"model {name!r} is a {type(loaded.pipe).__name__}, which has no "
                        "transformer to accelerate"
                    )
                found = self._there[name] = Shelved(name, loaded, self.turns)
            return found
