"""Parts of a recipe from JSON values, and settings of all parts by their own names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from flashomni.engine.groups import Group, load_groups
from flashomni.engine.recipe_file import plain
from flashomni.engine.recipe_parts import SECTIONS
from flashomni.engine.schedules import Schedule, make_schedule, schedules
from flashomni.engine.schedules import fields as schedule_fields
from flashomni.policies import Policy, make_policy, policies
from flashomni.policies import fields as policy_fields
from flashomni.util.words import meant

T = TypeVar("T")


def changed_part(key: str, value: Any, old: Any) -> Any:
    """A part of a recipe that a user gives: an object, a name, or some of its settings."""
    if key == "forecast" and isinstance(value, str):
        # Weights belong to the forecast that they were fitted for.
        return _set_fields(key, old, {"name": value, "fitted": None})
    if key in SECTIONS and isinstance(value, Mapping):
        known = _names(SECTIONS[key])
        for setting in value:
            if setting not in known:
                raise ValueError(f"{key} has {', '.join(known)}; got {setting!r}")
        return _set_fields(key, old, value)
    if key == "groups":
        return load_groups(plain(value, key) if _is_json(value) else value, load_part)
    if key in ("policy", "policy_without_text", "schedule"):
        value = {"name": value} if isinstance(value, str) else value
        if isinstance(value, Mapping):
            return load_part(key, plain(value, key))
    return value


def _is_json(value: Any) -> bool:
    """Whether a list of groups has no objects in it."""
    return isinstance(value, (list, tuple)) and not any(isinstance(each, Group) for each in value)


def place_settings(parts: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Change settings that are given by their own names, wherever they belong."""
    schedule, policy = parts["schedule"], parts["policy"]
    own = {part: _names(kind) for part, kind in SECTIONS.items()}
    if isinstance(schedule, Schedule):
        own["schedule"] = _names(type(schedule))
    if isinstance(policy, Policy):
        own["policy"] = _names(type(policy))
    own["forecast"].remove("name")
    found: dict[str, dict[str, Any]] = {}
    others: dict[str, Any] = {}
    elsewhere = {name for kind in schedules().values() for name in _names(kind)}
    for key, value in settings.items():
        part, _, name = key.rpartition(".")  # sparse.carry, or carry alone
        place = next((p for p, names in own.items() if name in names and part in ("", p)), None)
        if place is not None:
            if name in found.setdefault(place, {}):
                raise ValueError(f"{name} of {place} is given twice")
            found[place][name] = value
        elif key in elsewhere:
            others[key] = value
        else:
            named = [name for names in own.values() for name in names]
            known = dict.fromkeys([*parts, *named, *sorted(elsewhere)])
            near = meant(key, known)
            raise ValueError(
                f"settings of {parts['name']} are {', '.join(known)}; got {key!r}{near}"
            )
    if others:
        parts["schedule"] = _other_schedule(schedule, others, found.pop("schedule", {}))
    for part, values in found.items():
        parts[part] = _set_fields(part, parts[part], values)


def _other_schedule(old: Schedule, wanted: Mapping[str, Any], own: Mapping[str, Any]) -> Schedule:
    """The one schedule that has all of these settings; what both have is kept."""
    wanted = {**own, **wanted}
    known = {name: kind for name, kind in schedules().items() if set(wanted) <= {*_names(kind)}}
    # What comes with the library keeps its meaning when an extension has a setting of that name.
    home = make_schedule("interval").__module__.rpartition(".")[0] + "."
    fitting = [name for name, kind in known.items() if kind.__module__.startswith(home)]
    fitting = fitting if len(fitting) == 1 else list(known)
    if len(fitting) != 1:
        which = f"several schedules, {', '.join(fitting)}: name one" if fitting else "no schedule"
        raise ValueError(f"settings {', '.join(wanted)} belong to {which}")
    had = _names(type(old)) if isinstance(old, Schedule) else []
    shared = {key: getattr(old, key) for key in had if key in _names(known[fitting[0]])}
    return load_part("schedule", {"name": fitting[0], **shared, **wanted})


def _set_fields(part: str, old: T, values: Mapping[str, Any]) -> T:
    """A part with other settings."""
    checked = plain(values, part)
    checked = thawed(checked) if part == "policy" else checked
    return _made(part, lambda: dataclasses.replace(old, **checked))  # type: ignore[type-var]


def load_part(key: str, value: Any) -> Any:
    """A part of a recipe as JSON has it, as an object."""
    if key == "groups":
        return load_groups(value, load_part)
    if key in ("name", "source", "tuned") or (key == "policy_without_text" and value is None):
        return value
    if key in SECTIONS:
        kind, known = SECTIONS[key], _names(SECTIONS[key])
        if not isinstance(value, Mapping):
            raise ValueError(f"{key} must be an object of {', '.join(known)}, got {value!r}")
        for setting in value:
            if setting not in known:
                raise ValueError(f"{key} has {', '.join(known)}; got {setting!r}")
        return _made(key, lambda: kind(**value))
    names = schedules() if key == "schedule" else policies()
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        choices = ", ".join(names)
        raise ValueError(
            f'{key} must be {{"name": one of {choices}, setting: value}}, got {value!r}'
        )
    if key == "schedule":
        return _made(key, lambda: make_schedule(**value))
    return _made(key, lambda: make_policy(**thawed(value)))  # settings of policies are JSON


def _made(part: str, make: Callable[[], T]) -> T:
    try:
        return make()
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{part}: {error}") from error


def _names(kind: type) -> list[str]:
    """Settings of a part."""
    if issubclass(kind, Schedule):
        return [f.name for f in schedule_fields(kind)]
    if issubclass(kind, Policy):
        return [f.name for f in policy_fields(kind)]
    return [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]  # a section


def thawed(value: Any) -> Any:
    """JSON's lists and objects."""
    if isinstance(value, Mapping):
        return {key: thawed(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [thawed(item) for item in value]
    return value
