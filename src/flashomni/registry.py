"""One registry for everything that can be added: policies, schedules, forecasts, adapters, peers.

Names are explicit and unique. What comes with the library is found by importing the files of one
package; what comes from elsewhere, by an entry point or by importing a file that registers::

    [project.entry-points."flashomni.policies"]
    diagonal = "my_package.diagonal"
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """The things of one kind, by name.

    Args:
        kind: what one of them is called in errors, e.g. ``policy``.
        package: its public modules register what comes with the library.
        group: entry point group of those that live elsewhere, e.g. ``flashomni.policies``.
    """

    def __init__(self, kind: str, package: str, group: str) -> None:
        self.kind, self.package, self.group = kind, package, group
        self._found: dict[str, T] = {}
        self._origins: dict[str, str] = {}
        self._broken: dict[str, str] = {}
        self._state = "new"

    def add(self, name: str, thing: T, origin: Any = None) -> T:
        """Register ``thing``.

        Args:
            name: what users call it.
            thing: what :meth:`get` gives back.
            origin: the class or function that was decorated, for errors; ``thing`` by default.
                The same definition may register again (a reloaded module, a notebook's cell).

        Raises:
            ValueError: the name is no word, or something else has it already.
        """
        if not isinstance(name, str) or not name or not set(name).isdisjoint(" :,=\t\n/\\"):
            raise ValueError(
                f"the name of a {self.kind} must be a word without spaces, colons, commas or "
                f"slashes, got {name!r}"
            )
        if self._state == "new":  # what comes with the library has its names first
            self._import_package()
        source: Any = thing if origin is None else origin
        where = f"{source.__module__}.{source.__qualname__}"
        if self._origins.get(name, where) != where:
            raise ValueError(
                f"{self.kind} {name!r} is registered twice, by {self._origins[name]} and by "
                f"{where}: names must be unique"
            )
        self._found[name], self._origins[name] = thing, where
        return thing

    def all(self) -> dict[str, T]:
        """Everything that could be loaded, by name."""
        if self._state in ("new", "package"):
            self._import_package()
            self._load_entry_points()
        return dict(sorted(self._found.items()))

    def broken(self) -> dict[str, str]:
        """Entry points that could not be imported: name -> reason."""
        self.all()
        return dict(self._broken)

    def get(self, name: str) -> T:
        """The thing of that name.

        Raises:
            ValueError: there is none; the message lists the names there are.
        """
        known = self.all()
        if name not in known:
            why = f" ({self._broken[name]})" if name in self._broken else ""
            raise ValueError(f"{self.kind} must be one of {', '.join(known)}, got {name!r}{why}")
        return known[name]

    def __contains__(self, name: object) -> bool:
        return name in self.all()

    def _import_package(self) -> None:
        if self._state != "new":
            return
        self._state = "package"
        try:
            for name in public_modules(self.package):
                importlib.import_module(name)
        except BaseException:
            self._state = "new"
            raise

    def _load_entry_points(self) -> None:
        self._state = "loading"
        try:
            for point in entry_points(group=self.group):
                self._load(point)
        except BaseException:
            self._state = "package"  # asked again, it is said again
            raise
        self._state = "ready"

    def _load(self, point: EntryPoint) -> None:
        package = "an unknown package" if point.dist is None else point.dist.name
        before = set(self._found)
        try:
            point.load()
        except ImportError as error:
            self._broken[point.name] = f"entry point of {package} cannot be imported: {error}"
            return
        except ValueError as error:
            raise ValueError(f"{error} (entry point {point.name!r} of {package})") from error
        if point.name in before and self._origins[point.name].startswith(f"{self.package}."):
            raise ValueError(
                f"{self.kind} {point.name!r} comes with FlashOmni, but {package} has an entry "
                f"point of that name in {self.group}: names must be unique"
            )
        if point.name not in self._found:
            self._broken[point.name] = (
                f"entry point of {package} registers no {self.kind} of its name"
            )


def public_modules(package: str) -> list[str]:
    """Names of the modules of a package that do not begin with an underscore; not of packages."""
    path = importlib.import_module(package).__path__
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
