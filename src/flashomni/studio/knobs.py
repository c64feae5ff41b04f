"""Settings of a recipe as controls: read from its dataclasses, so that a new setting has one too.

What a setting may be, its class alone knows, and says it in the error of a wrong value; that is
where ranges and choices come from. What it does is the line of its docstring.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from dataclasses import dataclass
from typing import Any

from flashomni.engine import Recipe, StepKind
from flashomni.engine.forecasts import forecasts
from flashomni.engine.recipe_parts import SECTIONS
from flashomni.engine.schedules import schedules
from flashomni.policies import policies
from flashomni.util.settings import parse_settings
from flashomni.util.words import one_line

WRONG = "\N{WHITE QUESTION MARK ORNAMENT}"  # a value that no setting takes
RANGE = re.compile(r"(an integer|a number|numbers?) from (\S+) to (\S+?),? got")
CHOICES = re.compile(r"must be one of (.+), got")
SWITCH = "must be true or false"
PARTS = ("schedule", "policy", *SECTIONS)
NAMED = ("schedule", "policy", "forecast")  # parts of which there are several, by name
COMPUTED = "schedule.computed"
NO_CONTROL = {"sparse.symbols"}  # a path of the machine that this runs on
WIDE = 100  # a slider over more integers than this is of no use
LETTERS, MORE = 150, 260  # of what a control says; of one with choices, which it explains
SELDOM = ("schedule.of", "schedule.min_steps")  # in the last group, whatever its others say

# Groups of the page, in this order: a title, whether it is open, and its settings. What no other
# group names is in the last.
GROUPS: tuple[tuple[str, bool, tuple[str, ...]], ...] = (
    ("Steps: which are computed", True, (COMPUTED, "schedule", "schedule.*")),
    (
        "Cache: what the others take from before",
        True,
        ("forecast", "forecast.layer_order", "forecast.order", "forecast.level",
         "sparse.degrade_below"),
    ),
    (
        "Attention: what is skipped",
        False,
        ("policy", "policy.*", "sparse.in_computed", "sparse.dense_steps", "sparse.summaries",
         "sparse.carry", "sparse.refresh", "sparse.min_skip"),
    ),
    ("Everything else", False, ("*",)),
)  # fmt: skip


@dataclass(frozen=True)
class Knob:
    """One setting.

    Attributes:
        key: ``sparse.carry``; of a part itself its name, ``policy``.
        owner: name of the policy or schedule that has it; empty of what every recipe has.
        kind: ``choice``, ``switch``, ``integer``, ``number``, ``text``.
        value: what it is now; ``None`` where it is unset.
        low: of a slider.
        high: of a slider; a wide range is cut, and typed numbers may lie above.
        choices: all that is allowed.
        says: what it does.
        unset: whether it may be ``None``, which it is by default.
    """

    key: str
    owner: str
    kind: str
    value: Any
    low: float = 0.0
    high: float = 1.0
    choices: tuple[Any, ...] = ()
    says: str = ""
    unset: bool = False

    @property
    def label(self) -> str:
        """In words."""
        return self.key.rpartition(".")[2].replace("_", " ")


def knobs(recipe: Recipe, num_steps: int) -> list[Knob]:
    """Controls of a recipe, in the order of its parts.

    Args:
        recipe: whose settings.
        num_steps: of the generation: how far numbers of steps go.
    """
    found = [] if computed_steps(recipe, num_steps) is None else [_computed(recipe, num_steps)]
    for part in PARTS:
        owner = getattr(recipe, part)
        found += [_which(part, owner.name)] if part in NAMED else []
        found += _of(part, owner, num_steps)
    return found


def every(num_steps: int) -> list[Knob]:
    """Controls of every recipe there can be, with the settings of all policies and schedules."""
    plain = Recipe.of("dense")
    found = [_computed(plain, num_steps)]
    for part in PARTS:
        found += [_which(part, getattr(plain, part).name)] if part in NAMED else []
        owners: dict[str, Any] = {"schedule": schedules, "policy": policies}
        kinds = owners[part]().values() if part in owners else ()
        for owner in [cls() for cls in kinds] or [getattr(plain, part)]:
            found += _of(part, owner, num_steps)
    return found


def _of(part: str, owner: Any, num_steps: int) -> list[Knob]:
    """Controls of the settings of one part."""
    found = []
    for field in dataclasses.fields(owner):
        key = f"{part}.{field.name}"
        if key not in NO_CONTROL and key not in (COMPUTED, "forecast.name"):
            knob = _knob(key, owner, field.name, num_steps)
            found += [] if knob is None else [knob]
    return found


def grouped(found: list[Knob]) -> list[list[Knob]]:
    """Controls by :data:`GROUPS`, each in the order that is named there."""
    left = list(found)
    groups = []
    for _, _, wanted in GROUPS:
        mine: list[Knob] = []
        for pattern in wanted:
            stem = pattern.removesuffix("*")
            whole = stem == pattern
            mine += [
                knob
                for knob in left
                if knob.key == pattern
                or (
                    not whole and knob.key.startswith(stem) and (not stem or knob.key not in SELDOM)
                )
            ]
            left = [k for k in left if k not in mine]
        groups.append(mine)
    return groups


def computed_steps(recipe: Recipe, num_steps: int) -> int | None:
    """How many steps are computed; ``None`` where the schedule decides that as it goes."""
    plan = recipe.plan(num_steps)
    if plan is None:
        return None
    return sum(kind is not StepKind.DISPATCH for kind in plan.kinds)


def turned(recipe: Recipe, key: str, value: Any, num_steps: int) -> Recipe:
    """The recipe with one control moved.

    Args:
        recipe: before.
        key: of the control.
        value: where it is now; a page gives numbers as floats.
        num_steps: of the generation.

    Raises:
        ValueError: it is not allowed.
    """
    if key == COMPUTED:
        if value is None:  # a box that was emptied
            raise ValueError("computed steps must be a number, got none")
        ramp = {"name": "ramp", "computed": int(value), "of": num_steps}
        return recipe.replace(schedule=ramp)
    if key in NAMED:
        if getattr(recipe, key).name == value:
            return recipe  # asked for by name alone, it would come with its defaults
        return recipe.replace(**{key: str(value)})
    part, _, name = key.partition(".")
    if part not in PARTS or not name:
        raise ValueError(f"key must be that of a control, got {key!r}")
    whole = _allowed(getattr(recipe, part), name)[0] == "integer"
    if whole and isinstance(value, float) and value.is_integer():
        value = int(value)
    elif isinstance(value, str):  # a list of steps, written as on the command line
        value = parse_settings(f":{name}={value}")[1][name] if value.strip() else value
    return recipe.replace(**{key: value})


def changes(before: Recipe, after: Recipe) -> list[str]:
    """The settings in which two recipes differ, as ``carry hold``; of another policy or schedule
    those that are not its defaults."""
    found = []
    for part in PARTS:
        old, new = getattr(before, part), getattr(after, part)
        if part in ("schedule", "policy") and old.name != new.name:
            found.append(f"{part} {new.name}")
            old = type(new)()
        for field in dataclasses.fields(new):
            value = getattr(new, field.name)
            if value != getattr(old, field.name):
                name = "forecast" if (part, field.name) == ("forecast", "name") else field.name
                says = ("off", "on")[value] if isinstance(value, bool) else one_line(value, 40)
                found.append(f"{name.replace('_', ' ')} {says}")
    return found


def _computed(recipe: Recipe, num_steps: int) -> Knob:
    """However the schedule plans, by how many steps it computes."""
    says = "how many steps are computed; the others are forecast from them"
    value = computed_steps(recipe, num_steps)
    return Knob(COMPUTED, "", "integer", value, min(2, num_steps), num_steps, says=says)


def _which(part: str, value: str) -> Knob:
    registries: dict[str, Any] = {
        "schedule": schedules, "policy": policies, "forecast": forecasts,
    }  # fmt: skip
    says = {
        "schedule": "the rule that says which steps compute",
        "policy": "chooses the tiles that are cached and the key blocks that are skipped",
        "forecast": "how cached values are carried forward",
    }
    return Knob(
        part, "", "choice", value, choices=tuple(sorted(registries[part]())), says=says[part]
    )


def _knob(key: str, owner: Any, name: str, num_steps: int) -> Knob | None:
    """The control of a setting; ``None`` where it is neither a value nor a list of numbers."""
    value = getattr(owner, name)
    kind, low, high, choices = _allowed(owner, name)
    if (
        isinstance(value, (tuple, list))
        and value
        and all(isinstance(x, (int, float)) for x in value)
    ):
        kind, value = "text", json.dumps(list(value), separators=(",", ":"))
    if kind == "none":
        return None
    if kind == "integer" and high > WIDE:
        wide = num_steps if key.startswith("schedule.") else 16
        high = max(wide, 2 * (value or 0), low + 1)
    elif kind == "number" and high > 1:
        high = min(high, max(2.0 * (value or 0.0), 2.0))
    says = _first(_described(type(owner)).get(name, ""), whole=kind == "choice")
    named = owner.name if key.startswith(("schedule.", "policy.")) else ""
    unset = any(f.name == name and f.default is None for f in dataclasses.fields(owner))
    return Knob(key, named, kind, value, low, high, choices, says, unset)


def _allowed(owner: Any, name: str) -> tuple[str, float, float, tuple[Any, ...]]:
    """``(kind, low, high, choices)``, from the error of a wrong value."""
    now = getattr(owner, name)
    try:
        dataclasses.replace(owner, **{name: WRONG})
        text = ""  # any text is taken
    except (TypeError, ValueError, AttributeError) as error:
        text = str(error)
    if SWITCH in text or isinstance(now, bool):
        return "switch", 0, 1, ()
    span, choice = RANGE.search(text), CHOICES.search(text)
    if span and not isinstance(now, (str, tuple, list)):
        whole = span[1] == "an integer"
        return "integer" if whole else "number", float(span[2]), float(span[3]), ()
    if choice and not isinstance(now, (tuple, list)):
        words = tuple(choice[1].split(", "))
        numbers = all(word.isdecimal() for word in words)
        return "choice", 0, 1, tuple(map(int, words)) if numbers else words
    return "text" if isinstance(now, str) else "none", 0, 1, ()


def _described(cls: type) -> dict[str, str]:
    """The lines of ``Args:`` in the docstring of a class, by name."""
    found: dict[str, str] = {}
    name = ""
    for line in (inspect.getdoc(cls) or "").partition("Args:\n")[2].splitlines():
        if not line.startswith("    "):
            break
        start = re.match(r"    (\w+): (.*)", line)
        if start:
            name, found[start[1]] = start[1], start[2]
        elif name:
            found[name] += " " + line.strip()
    return found


def _first(text: str, whole: bool) -> str:
    """The first sentence, or what of it stands before a semicolon; without docstrings' marks."""
    text = re.sub(r":\w+:`~?([^`]*)`", r"\1", text).replace("``", "").replace("`", "")
    end = r"(?<=[^.])\.(?: |$)" if whole else r"(?<=[^.])\.(?: |$)|; "
    return one_line(re.split(end, text)[0], MORE if whole else LETTERS)
