"""What a tuning run has found so far, on disk: an interrupted one goes on there."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from flashomni.tuning.record import Recording
from flashomni.util.files import write_text

FILE = "state.json"
SECONDS = "seconds"  # among the findings: what they took, over all runs


class State:
    """JSON values by name, and recordings, in a folder; each is kept as soon as it is known.

    Args:
        folder: made if it is not there.
        about: what the findings depend on, JSON values. A folder of something else is not
            continued: its findings are dropped.
        begun: when this run began, of ``time.perf_counter``; now if left out.

    Attributes:
        resumed: how many findings there were.
        foreign: whether findings of something else were dropped.
    """

    def __init__(self, folder: Path, about: dict[str, Any], begun: float | None = None) -> None:
        self._begun = time.perf_counter() if begun is None else begun
        self.folder, self._about = folder, json.loads(json.dumps(about, default=str))
        self._found: dict[str, Any] = {}
        self.foreign = False
        try:
            data = json.loads((folder / FILE).read_text(encoding="utf-8"))
            self.foreign = data["about"] != self._about
            self._found = {} if self.foreign else dict(data["found"])
        except (OSError, ValueError, TypeError, KeyError):
            self._found = {}  # nothing there, or cut
        self._before = float(self._found.pop(SECONDS, 0.0))
        self.resumed = len(self._found)

    @property
    def seconds(self) -> float:
        """Of this run so far, and of earlier ones up to the last finding of each."""
        return self._before + time.perf_counter() - self._begun

    def get(self, name: str) -> Any:
        """What was found under that name, or ``None``."""
        return self._found.get(name)

    def put(self, name: str, value: Any) -> Any:
        """Keep a finding, and give it back."""
        self._found |= {name: value, SECONDS: self.seconds}
        text = json.dumps({"about": self._about, "found": self._found})
        write_text(self.folder / FILE, text)
        return value

    def recording(self, number: int) -> Recording | None:
        """A dense run that was recorded before; ``None`` if there is none, or it was cut."""
        if self.get(f"recorded {number}") is None:
            return None
        try:
            return Recording.load(self._path(number))
        except (OSError, ValueError):
            return None

    def keep(self, number: int, recording: Recording, seconds: float) -> None:
        """Keep a dense run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        recording.save(self._path(number))
        self.put(f"recorded {number}", seconds)

    def _path(self, number: int) -> Path:
        return self.folder / f"dense-{number}.safetensors"

    def forget_recordings(self) -> None:
        """The work is done: recordings are large, and nobody needs them any more."""
        for path in self.folder.glob("dense-*.safetensors"):
            path.unlink(missing_ok=True)


def key(*values: Any) -> str:
    """A short name of JSON values."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
