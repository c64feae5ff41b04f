"""A recipe: policy + schedule + forecast + storage + sparse. Data, with a JSON round trip."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashomni.engine.groups import Group, check_groups, load_groups, refuse_late
from flashomni.engine.recipe_file import plain, read_recipe, upgrade
from flashomni.engine.recipe_parts import (
    SECTIONS,
    ForecastSettings,
    GuidanceSettings,
    SparseSettings,
    StorageSettings,
)
from flashomni.engine.recipe_settings import changed_part, load_part, place_settings, thawed
from flashomni.engine.schedules import Plan, Schedule, make_schedule
from flashomni.engine.tuned_on import TunedOn
from flashomni.policies import Policy, make_policy, policies, refuse_trained
from flashomni.symbols import Grid
from flashomni.util.files import write_text
from flashomni.util.settings import parse_settings, write_settings
from flashomni.util.words import meant

FORMAT = 2
RECIPES = Path(__file__).parent.parent / "recipes"
SUFFIXES = (".json", ".yaml", ".yml")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what is computed, cached and skipped.

    :meth:`of` and :meth:`replace` take the settings of all sections by their own names.

    Args:
        policy: chooses the symbols on Update steps.
        name: what reports call it.
        schedule: which steps compute.
        forecast: how cached values are carried forward.
        storage: how they are kept.
        sparse: what is done with the symbols.
        guidance: what is done with the further branches of a step.
        policy_without_text: what runs in place of a policy that needs or prefers text tokens in
            the attention where there are none (Wan, LTX, ...).
        groups: layers with a schedule, forecast, policy or sparse settings of their own.
        source: of a published method: its paper.
        tuned: of a recipe that ``flashomni tune`` made: what on.

    Raises:
        ValueError: a value is not allowed, or two do not go together.
    """

    policy: Policy
    name: str = "custom"
    schedule: Schedule = field(default_factory=lambda: make_schedule("interval"))
    forecast: ForecastSettings = field(default_factory=ForecastSettings)
    storage: StorageSettings = field(default_factory=StorageSettings)
    sparse: SparseSettings = field(default_factory=SparseSettings)
    guidance: GuidanceSettings = field(default_factory=GuidanceSettings)
    policy_without_text: Policy | None = None
    groups: tuple[Group, ...] = ()
    source: str = ""
    tuned: TunedOn | None = None

    def __post_init__(self) -> None:
        wanted: dict[str, type] = {"policy": Policy, "schedule": Schedule, **SECTIONS}
        for part, cls in wanted.items():
            if not isinstance(getattr(self, part), cls):
                article = "an" if cls.__name__[0] in "AEIOU" else "a"
                got = getattr(self, part)
                raise ValueError(f"{part} must be {article} {cls.__name__}, got {got!r}")
        other = self.policy_without_text
        if other is not None and not isinstance(other, Policy):
            raise ValueError(f"policy_without_text must be a Policy or None, got {other!r}")
        self.sparse.check_policies(self.policy, other)
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name must be a non-empty string, got {self.name!r}")
        if not isinstance(self.source, str):
            raise ValueError(f"source must be a string, got {self.source!r}")
        object.__setattr__(self, "groups", load_groups(self.groups, load_part))
        object.__setattr__(self, "tuned", TunedOn.load(self.tuned))
        if self.groups:
            refuse_late(self.schedule)
            check_groups(self)
        self.to_dict()  # what has no name or is no JSON is found here, not at the report
        if self.forecast.level == "output":
            self._check_output_level()

    def _check_output_level(self) -> None:
        if self.policy.name != "cached" and not self.sparse.in_computed:
            raise ValueError(
                "forecast level 'output' leaves out the whole model, so policy must be 'cached', "
                f"got {self.policy.name!r}, or used in computed steps (sparse.in_computed)"
            )
        if any(group.apart for group in self.groups):
            raise ValueError(
                "forecast level 'output' leaves out the whole model; level must be 'layers' where "
                "there are groups of layers with a schedule or a forecast of their own"
            )
        if self.schedule.decides:
            raise ValueError(
                f"schedule {self.schedule.name!r} decides inside a step, which forecast level "
                "'output' leaves out; level must be 'layers'"
            )

    @property
    def at_output(self) -> bool:
        """Whether the output of the whole model is forecast, and not what its layers add.

        Also where nothing is said, and every layer would be cached whole in each Dispatch step.
        """
        level, schedule = self.forecast.level, self.schedule
        whole = self.policy.name == "cached" and self.sparse.degrade_below == 1.0
        apart = bool(self.groups) or schedule.decides or schedule.front + schedule.back > 0
        return level == "output" or (level == "auto" and whole and not apart)

    @property
    def policies(self) -> tuple[Policy, ...]:
        """That of the recipe, and those of groups that have their own."""
        return self.policy, *(group.policy for group in self.groups if group.policy is not None)

    @property
    def order(self) -> int:
        """The highest forecast order that is used: as many anchors before the last are kept."""
        return max(self.forecast.order, self.forecast.layer_order)

    @property
    def skips(self) -> bool:
        """Whether anything can be left out in a Dispatch step."""
        return self.guidance.acts or any(policy.name != "dense" for policy in self.policies)

    def plan(self, num_steps: int) -> Plan | None:
        """The steps of a generation, of layers in no group; ``None`` where the schedule decides."""
        return self.schedule.plan(num_steps, self.order)

    def policy_for(self, grid: Grid) -> Policy:
        """The policy of a sequence: the other one where the first reads text and there is none."""
        policy, other = self.policy, self.policy_without_text
        reads_text = policy.needs_text or policy.prefers_text
        return policy if grid.text_spans or other is None or not reads_text else other

    def replace(self, **changes: Any) -> Recipe:
        """This recipe with other values; it is checked again.

        Args:
            changes: parts (``policy``, ``schedule``, ...) as objects, as names, or as mappings of
                some of their settings (``groups``: the whole list); or settings of any part by
                their own names, alone or behind that of the part (``sparse.carry``). A setting that
                only another schedule has selects that schedule: ``interval=3`` on a list of steps
                gives the schedule ``interval``.

        Raises:
            ValueError: a key is no setting, or a value is not allowed.
        """
        parts: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        settings: dict[str, Any] = {}
        for key, value in changes.items():
            if key in parts:
                parts[key] = changed_part(key, value, parts[key])
            else:
                settings[key] = value
        place_settings(parts, settings)
        return Recipe(**parts)

    def with_settings(self, name: str, settings: Mapping[str, Any]) -> Recipe:
        """This recipe under another name, with other values; see :meth:`replace`."""
        return self.replace(**{"name": name, **settings})

    def to_dict(self) -> dict[str, Any]:
        """JSON values only; :meth:`from_dict` gives the same recipe back."""
        other = self.policy_without_text
        return thawed(
            {
                "format": FORMAT,
                "name": self.name,
                "source": self.source,
                "policy": self.policy.to_dict(),
                "policy_without_text": None if other is None else other.to_dict(),
                "schedule": self.schedule.to_dict(),
                **{section: dataclasses.asdict(getattr(self, section)) for section in SECTIONS},
                "groups": [group.to_dict() for group in self.groups],
                **({} if self.tuned is None else {"tuned": dataclasses.asdict(self.tuned)}),
            }
        )

    @classmethod
    def from_dict(cls, data: Any) -> Recipe:
        """The inverse of :meth:`to_dict`; what is left out keeps its default. Reads format 1 too.

        Raises:
            ValueError: a key or a value is not allowed; the message names it and what is.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"a recipe must be a JSON object, got {type(data).__name__}")
        data = upgrade(plain(data, "a recipe"), FORMAT)
        allowed = [f.name for f in dataclasses.fields(cls)]
        for key in data:
            if key not in allowed:
                raise ValueError(f"a recipe has {', '.join(allowed)}; got {key!r}")
        values = {key: load_part(key, value) for key, value in data.items()}
        if "policy" not in values:
            values["policy"] = load_part("policy", None)
        return cls(**values)

    def save(self, path: str | Path) -> None:
        """Write JSON; the file appears whole or not at all."""
        write_text(path, json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read what :meth:`save` wrote, or the same in YAML (``.yaml``, ``.yml``).

        Raises:
            ValueError: the file is missing, cannot be read, or is not a recipe.
        """
        data = read_recipe(Path(path))
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"recipe {path}: {error}") from error

    @classmethod
    def of(cls, recipe: Recipe | Policy | str | Path, **settings: Any) -> Recipe:
        """A recipe as users name it.

        Args:
            recipe: a recipe, a policy, the name of a preset, of a method's recipe or of a policy
                (settings may follow: ``balanced:interval=3,tau_q=.5``), or a path to JSON or YAML.
            settings: see :meth:`replace`.

        Raises:
            ValueError: it is none of these, or a setting is not allowed.
            NotImplementedError: a method that a model has to be trained with (VSA, SLA).
        """
        if isinstance(recipe, Policy):
            recipe = cls(policy=recipe)
        if isinstance(recipe, Recipe):
            return recipe.replace(**settings) if settings else recipe
        if not isinstance(recipe, (str, Path)):
            raise ValueError(f"recipe must be a Recipe, a name or a path, got {recipe!r}")
        text = str(recipe)
        name = text.partition(":")[0].strip()
        if name in (*presets(), *methods()):
            base = cls.load(RECIPES / f"{name}.json")
        elif name in policies():
            base = cls(name=name, policy=make_policy(name))
        elif text.lower().endswith(SUFFIXES) or _exists(text):
            return cls.load(text).replace(**settings)
        else:
            refuse_trained(name)
            raise ValueError(
                f"recipe must be a preset ({', '.join(presets())}), a method "
                f"({', '.join(methods())}), a policy ({', '.join(policies())}), one of these with "
                f"settings (balanced:interval=3), or a path to a .json or .yaml file, got {text!r}"
                f"{meant(name, (*presets(), *methods(), *policies()))}"
            )
        said = parse_settings(text)[1]
        for key in settings:
            if key in said:
                raise ValueError(f"{key} is given twice, in {text!r} and as a keyword")
        named = base.with_settings(text, said) if said else base
        return (
            named.with_settings(_name_with(named.name, settings), settings) if settings else named
        )


def presets() -> list[str]:
    """Names of the recipes that are recommended; methods of papers are named beside them."""
    return [name for name, source in _shipped().items() if not source]


def methods() -> list[str]:
    """Names of the recipes of published methods: those that name a source."""
    return [name for name, source in _shipped().items() if source]


@functools.lru_cache(maxsize=1)
def _shipped() -> dict[str, str]:
    """The recipes that come with the library, and the source that each names."""
    paths = sorted(RECIPES.glob("*.json"))
    return {path.stem: json.loads(path.read_text("utf-8")).get("source", "") for path in paths}


def _name_with(name: str, settings: Mapping[str, Any]) -> str:
    """``balanced:interval=3``, which gives the recipe again; the old name where none would."""
    said = write_settings(settings)
    return f"{name}{',' if ':' in name else ':'}{said}" if said else name


def _exists(text: str) -> bool:
    try:
        return bool(text) and Path(text).exists()
    except (OSError, ValueError):  # a name too long, a null byte
        return False
