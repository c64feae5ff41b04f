"""What a run tells while it goes on, and how a page hears it: a thread works, a generator tells."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image

from flashomni.util.words import one_line


@dataclass(frozen=True)
class Waiting:
    """So many runs come first."""

    place: int


@dataclass(frozen=True)
class Progress:
    """How far a stage is.

    Attributes:
        stage: ``dense``, ``accelerated``, ...
        done: steps.
        total: steps; 0 where nobody knows.
        preview: what there is so far.
    """

    stage: str
    done: int
    total: int
    preview: Image.Image | None = None


@dataclass(frozen=True)
class Finished:
    """The end, with what came of it."""

    value: Any


@dataclass(frozen=True)
class Failed:
    """The end, with what went wrong."""

    error: Exception


Event = Waiting | Progress | Finished | Failed
Emit = Callable[[Event], None]


def streamed(work: Callable[[Emit], Any], stop: threading.Event) -> Iterator[Event]:
    """Run ``work`` in a thread and give its events as they come; of progress only the newest.

    The last one is :class:`Finished` with what it returned, or :class:`Failed`. A generator that
    is closed before, because its page is gone, sets ``stop``.
    """
    told: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def run() -> None:
        try:
            told.put(Finished(work(told.put)))
        except Exception as error:  # whoever reads shows it
            told.put(Failed(error))

    thread = threading.Thread(target=run, name="flashomni-studio", daemon=True)
    thread.start()
    try:
        while True:
            events = [told.get()]
            while not told.empty():
                events.append(told.get_nowait())
            for place, event in enumerate(events):
                is_last = place == len(events) - 1
                if is_last or not isinstance(event, Progress):
                    yield event
            if isinstance(events[-1], (Finished, Failed)):
                break
        thread.join()
    finally:
        stop.set()


def plain(error: Exception) -> str:
    """What a page says of an error."""
    if isinstance(error, (ValueError, NotImplementedError)):
        return one_line(error, 1200)
    text = one_line(error, 500) or type(error).__name__
    if "out of memory" in text.lower() or isinstance(error, MemoryError):
        return f"{text}; the device has too little memory: try a smaller picture or fewer frames"
    return text if isinstance(error, (RuntimeError, OSError)) else f"{type(error).__name__}: {text}"
