"""One registry for everything that can be added: policies, schedules, forecasts, adapters, peers.

Names are explicit and unique. What comes with the library is found by importing the files of one
package; what comes from elsewhere, by an entry point or by importing a file that registers::

    [project.entry-points."flashomni.policies"]
    diagonal = "my_package.diagonal"
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class NameTakenError(ValueError):
    """A second thing asks for a name."""


@dataclass(frozen=True)
class Origin:
    """Where a thing is defined: two definitions of one origin are versions of one thing.

    Args:
        module: name of the module; ``__main__`` in a script or a notebook.
        file: its file; ``None`` in a notebook.
        name: of the class or function in it.
    """

    module: str
    file: str | None
    name: str

    @classmethod
    def of(cls, thing: Any) -> Origin:
        """The origin of a class or function."""
        if not hasattr(thing, "__qualname__"):
            raise TypeError(f"only classes and functions can be registered, got {thing!r}")
        file = getattr(sys.modules.get(thing.__module__), "__file__", None)
        return cls(thing.__module__, file, thing.__qualname__)

    def __str__(self) -> str:
        where = f"{self.module}.{self.name}"
        return where if self.file is None else f"{where} ({self.file})"


class Registry(Generic[T]):
    """The things of one kind, by name.

    Args:
        kind: what one of them is called in errors, e.g. ``policy``.
        package: its public modules register what comes with the library; or one module does.
        group: entry point group of those that live elsewhere, e.g. ``flashomni.policies``.
    """

    def __init__(self, kind: str, package: str, group: str) -> None:
        self.kind, self.package, self.group = kind, package, group
        self._found: dict[str, T] = {}
        self._origins: dict[str, Origin] = {}
        self._broken: dict[str, str] = {}
        self._lock = threading.Lock()  # of the dicts; never held during an import
        self._has_package = self._has_entry_points = False
        self._looking = threading.local()  # what this thread is looking for already

    def add(self, name: str, thing: T, origin: Any = None) -> T:
        """Register ``thing``.

        Args:
            name: what users call it.
            thing: what :meth:`get` gives back.
            origin: the class or function that was decorated, for errors; ``thing`` by default.
                The same definition may register again (a reloaded module, a notebook's cell).

        Raises:
            NameTakenError: something else has the name already.
            ValueError: the name is no word.
        """
        if not isinstance(name, str) or not name or set(name) & set(" :,=\t\r\n/\\[]"):
            raise ValueError(
                f"the name of a {self.kind} must be a word without spaces, colons, commas, equals "
                f"signs, brackets or slashes, got {name!r}"
            )
        where = Origin.of(thing if origin is None else origin)
        if not self._is_ours(where):  # what comes with the library has its names first
            self._import_package()
        with self._lock:
            if self._origins.get(name, where) != where:
                raise NameTakenError(
                    f"{self.kind} {name!r} is registered twice, by {self._origins[name]} and by "
                    f"{where}: names must be unique"
                )
            self._found[name], self._origins[name] = thing, where
        return thing

    def remove(self, name: str) -> None:
        """Give a name back that :meth:`add` took: for tests and notebooks."""
        with self._lock:
            self._found.pop(name, None)
            self._origins.pop(name, None)

    def all(self) -> dict[str, T]:
        """Everything that could be loaded, by name.

        Raises:
            NameTakenError: an installed package brings a name that is taken.
        """
        self._import_package()
        self._load_entry_points()
        with self._lock:
            return dict(sorted(self._found.items()))

    def broken(self) -> dict[str, str]:
        """Entry points that could not be used: name -> reason."""
        self.all()
        return dict(self._broken)

    def get(self, name: str) -> T:
        """The thing of that name.

        Raises:
            ValueError: there is none; the message lists the names there are.
        """
        known = self.all()
        if isinstance(name, str) and name in known:
            return known[name]
        why = f" ({self._broken[name]})" if isinstance(name, str) and name in self._broken else ""
        raise ValueError(f"{self.kind} must be one of {', '.join(known)}, got {name!r}{why}")

    def __contains__(self, name: object) -> bool:
        return name in self.all()

    def __iter__(self) -> Iterator[str]:
        return iter(self.all())

    # Looking takes no lock, because an import that waits for a lock can wait for ever: two threads
    # may look at once, each import happens once, and the same thing registers again unchanged.

    def _import_package(self) -> None:
        with self._look("package") as first:
            if first and not self._has_package:
                for name in public_modules(self.package):
                    importlib.import_module(name)
                self._has_package = True

    def _load_entry_points(self) -> None:
        with self._look("entry points") as first:
            if first and not self._has_entry_points:
                for point in entry_points(group=self.group):
                    self._load(point)
                self._has_entry_points = True

    @contextmanager
    def _look(self, what: str) -> Iterator[bool]:
        """Whether this thread may look now: not in the middle of looking for the same."""
        busy = self._looking.__dict__
        if what in busy:
            yield False
            return
        busy[what] = True
        try:
            yield True
        finally:
            del busy[what]

    def _load(self, point: EntryPoint) -> None:
        package = "an unknown package" if point.dist is None else point.dist.name
        try:
            point.load()
        except NameTakenError as error:  # asked again, it is said again
            raise NameTakenError(f"{error} (entry point {point.name!r} of {package})") from error
        except Exception as error:
            self._broken[point.name] = (
                f"entry point of {package} cannot be imported: {type(error).__name__}: {error}"
            )
            return
        where = self._origins.get(point.name)
        if where is not None and self._is_ours(where):
            raise NameTakenError(
                f"{self.kind} {point.name!r} comes with FlashOmni, but {package} has an entry "
                f"point of that name in {self.group}: names must be unique"
            )
        if where is None:
            self._broken[point.name] = (
                f"entry point of {package} registers no {self.kind} of its name"
            )

    def _is_ours(self, where: Origin) -> bool:
        return f"{where.module}.".startswith(f"{self.package}.")


def public_modules(package: str) -> list[str]:
    """Names of the modules of a package that do not begin with an underscore; not of packages.

    None of a module that is no package: it is imported here.
    """
    path = getattr(importlib.import_module(package), "__path__", ())
    return [
        f"{package}.{module.name}"
        for module in pkgutil.iter_modules(path)
        if not module.ispkg and not module.name.startswith("_")
    ]


def decorator(registry: Registry, name: str) -> Callable[[Any], Any]:
    """A decorator that registers a class or function as ``name``."""

    def keep(thing: Any) -> Any:
        return registry.add(name, thing)

    return keep
