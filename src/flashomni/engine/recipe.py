"""A recipe: policy + schedule + forecast + storage + sparse. Data, with a JSON round trip."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashomni.engine.forecasts import forecasts
from flashomni.engine.recipe_file import read_recipe, upgrade
from flashomni.engine.schedules import Plan, Schedule, make_schedule, schedules
from flashomni.engine.state.storage import DTYPES
from flashomni.policies import Policy, check_int, check_range, make_policy, policies
from flashomni.symbols import Grid
from flashomni.util.files import write_text
from flashomni.util.settings import parse_settings

FORMAT = 2
RECIPES = Path(__file__).parent.parent / "recipes"
METHODS = ("fora", "taylorseer")  # recipes of published methods, which are no presets
HISTORY_DTYPES = ("compute", *DTYPES)
HISTORY_DEVICES = ("compute", "host")
LEVELS = ("layers", "output")


@dataclass(frozen=True, kw_only=True)
class ForecastSettings:
    """How cached values are carried forward.

    Args:
        name: a forecast (``flashomni show forecasts`` lists them).
        order: of cached tiles, 0 to 3: the forecast uses one anchor more.
        layer_order: of layers that are cached whole, and of the output, 0 to 3.
        level: ``layers`` caches tiles and layers; ``output`` what the whole model returned, and
            needs policy ``cached``.
    """

    name: str = "taylor"
    order: int = 1
    layer_order: int = 0
    level: str = "layers"

    def __post_init__(self) -> None:
        _check_choice("forecast.name", self.name, tuple(forecasts()))
        check_int("order", self.order, 0, 3)
        check_int("layer_order", self.layer_order, 0, 3)
        _check_choice("level", self.level, LEVELS)


@dataclass(frozen=True, kw_only=True)
class StorageSettings:
    """How histories and bias terms are kept.

    Args:
        history_dtype: ``compute``, ``bfloat16``, ``float16``, or ``float8`` (a scale for each
            token; it halves the memory and costs precision).
        history_device: ``compute`` keeps those of tiles beside the model, ``host`` in pinned host
            memory: a layer's are on the device while it and the layer before it run.
    """

    history_dtype: str = "compute"
    history_device: str = "compute"

    def __post_init__(self) -> None:
        _check_choice("history_dtype", self.history_dtype, HISTORY_DTYPES)
        _check_choice("history_device", self.history_device, HISTORY_DEVICES)


@dataclass(frozen=True, kw_only=True)
class SparseSettings:
    """What is done with the symbols.

    Args:
        degrade_below: S_q: a layer whose computed fraction is this or less is cached whole,
            attention and MLP, until it rises again; 0 never does that.
        min_skip: a row that would skip less than this share of its key blocks visits all of them:
            below break-even, skipping costs more than it saves.
        block_m: query tokens per block.
        block_n: key tokens per block.
    """

    degrade_below: float = 0.0
    min_skip: float = 0.0
    block_m: int = 128
    block_n: int = 128

    def __post_init__(self) -> None:
        check_range("degrade_below", self.degrade_below, 0.0, 1.0)
        check_range("min_skip", self.min_skip, 0.0, 1.0)
        for name in ("block_m", "block_n"):
            check_int(name, getattr(self, name), 16, 1024)
            if getattr(self, name) % 16:
                raise ValueError(f"{name} must be a multiple of 16, got {getattr(self, name)}")


SECTIONS: dict[str, type] = {
    "forecast": ForecastSettings,
    "storage": StorageSettings,
    "sparse": SparseSettings,
}


# Settings that name a thing: what they make of a recipe's part.
_BY_NAME: dict[str, Any] = {
    "policy": lambda recipe, name: make_policy(name),
    "schedule": lambda recipe, name: make_schedule(name),
    "forecast": lambda recipe, name: dataclasses.replace(recipe.forecast, name=name),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what is computed, cached and skipped.

    Args:
        policy: chooses the symbols on Update steps.
        name: what reports call it.
        schedule: which steps compute.
        forecast: how cached values are carried forward.
        storage: how they are kept.
        sparse: what is done with the symbols.
        policy_without_text: what runs in place of a policy that needs text tokens in the attention
            where there are none (Wan, LTX, ...); without it such a model is refused.

    Raises:
        ValueError: a value is not allowed, or two do not go together.
    """

    policy: Policy
    name: str = "custom"
    schedule: Schedule = field(default_factory=lambda: make_schedule("interval"))
    forecast: ForecastSettings = field(default_factory=ForecastSettings)
    storage: StorageSettings = field(default_factory=StorageSettings)
    sparse: SparseSettings = field(default_factory=SparseSettings)
    policy_without_text: Policy | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.policy, Policy):
            raise ValueError(f"policy must be a Policy, got {self.policy!r}")
        other = self.policy_without_text
        if other is not None and not isinstance(other, Policy):
            raise ValueError(f"policy_without_text must be a Policy or None, got {other!r}")
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name must be a non-empty string, got {self.name!r}")
        if not isinstance(self.schedule, Schedule):
            raise ValueError(f"schedule must be a Schedule, got {self.schedule!r}")
        for section, cls in SECTIONS.items():
            if not isinstance(getattr(self, section), cls):
                raise ValueError(
                    f"{section} must be {cls.__name__}, got {getattr(self, section)!r}"
                )
        self.to_dict()  # what has no name or is no JSON is found here, not at the report
        if self.forecast.level == "output":
            if self.policy.name != "cached":
                raise ValueError(
                    "forecast level 'output' caches all layers, so policy must be 'cached', got "
                    f"{self.policy.name!r}"
                )
            if self.schedule.decides:
                raise ValueError(
                    f"schedule {self.schedule.name!r} decides inside a step, which forecast level "
                    "'output' leaves out; use level 'layers'"
                )

    @property
    def order(self) -> int:
        """The highest forecast order that is asked for."""
        return max(self.forecast.order, self.forecast.layer_order)

    def plan(self, num_steps: int) -> Plan | None:
        """The steps of a generation; ``None`` where the schedule decides them one by one."""
        return self.schedule.plan(num_steps, self.order)

    @property
    def skips(self) -> bool:
        """Whether anything can be left out in a Dispatch step."""
        return self.policy.name != "dense"

    def policy_for(self, grid: Grid) -> Policy:
        """The policy of a sequence: the other one where the first needs text and there is none."""
        if self.policy.needs_text and not grid.text_spans and self.policy_without_text is not None:
            return self.policy_without_text
        return self.policy

    def replace(self, **changes: Any) -> Recipe:
        """This recipe with other values, by section or by setting; it is checked again."""
        own = {f.name for f in dataclasses.fields(self)}
        whole = {
            key: value
            for key, value in changes.items()
            if key in own and not (key == "forecast" and isinstance(value, str))
        }
        settings = {key: value for key, value in changes.items() if key not in whole}
        if isinstance(whole.get("schedule"), Mapping):
            whole["schedule"] = _named("schedule", whole["schedule"], schedules(), make_schedule)
        if isinstance(whole.get("schedule"), str):
            settings["schedule"] = whole.pop("schedule")
        recipe = dataclasses.replace(self, **whole) if whole else self
        return recipe.with_settings(recipe.name, settings) if settings else recipe

    def to_dict(self) -> dict[str, Any]:
        """JSON values only; :meth:`from_dict` gives the same recipe back."""
        other = self.policy_without_text
        return {
            "format": FORMAT,
            "name": self.name,
            "policy": self.policy.to_dict(),
            "policy_without_text": None if other is None else other.to_dict(),
            "schedule": self.schedule.to_dict(),
            **{section: dataclasses.asdict(getattr(self, section)) for section in SECTIONS},
        }

    @classmethod
    def from_dict(cls, data: Any) -> Recipe:
        """The inverse of :meth:`to_dict`; what is left out keeps its default. Reads format 1 too.

        Raises:
            ValueError: a key or a value is not allowed; the message names it and what is.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"a recipe must be a JSON object, got {type(data).__name__}")
        data = upgrade(dict(data), FORMAT)
        allowed = [f.name for f in dataclasses.fields(cls)]
        for key in data:
            if key not in allowed:
                raise ValueError(f"a recipe has {', '.join(allowed)}; got {key!r}")
        values: dict[str, Any] = {k: data[k] for k in ("name",) if k in data}
        values["policy"] = _named("policy", data.get("policy"), policies(), make_policy)
        if data.get("policy_without_text") is not None:
            other = data["policy_without_text"]
            values["policy_without_text"] = _named(
                "policy_without_text", other, policies(), make_policy
            )
        if "schedule" in data:
            values["schedule"] = _named("schedule", data["schedule"], schedules(), make_schedule)
        for section, kind in SECTIONS.items():
            if section in data:
                values[section] = _section(section, kind, data[section])
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
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"recipe {path}: {error}") from error

    def with_settings(self, name: str, settings: Mapping[str, Any]) -> Recipe:
        """This recipe under another name, with some settings of any section replaced.

        A setting that only another schedule has selects that schedule: ``interval=3`` on a list of
        steps gives the schedule ``interval``.

        Raises:
            ValueError: a key is no setting, or a value is not allowed.
        """
        parts: dict[str, Any] = {s: getattr(self, s) for s in ("schedule", *SECTIONS, "policy")}
        named = {key: settings[key] for key in _BY_NAME if isinstance(settings.get(key), str)}
        for key, value in named.items():
            parts[key] = _BY_NAME[key](self, value)
        other: dict[str, Any] = {}
        changes: dict[str, dict[str, Any]] = {}
        for key, value in settings.items():
            if key in named:
                continue
            place = next((s for s, part in parts.items() if key in _names(part)), None)
            if place is not None:
                changes.setdefault(place, {})[key] = tuple(value) if _is_list(value) else value
            elif any(key in _names(cls) for cls in schedules().values()):
                other[key] = value
            else:
                raise ValueError(
                    f"settings of {self.name} are {', '.join(self._settings(parts))}; got {key!r}"
                )
        if other:
            parts["schedule"] = _schedule_with({**other, **changes.pop("schedule", {})})
        for place, values in changes.items():
            parts[place] = dataclasses.replace(parts[place], **values)
        return dataclasses.replace(self, name=name, **parts)

    @staticmethod
    def _settings(parts: Mapping[str, Any]) -> list[str]:
        names = [name for part in parts.values() for name in _names(part)]
        others = [name for cls in schedules().values() for name in _names(cls)]
        return list(dict.fromkeys([*names, *_BY_NAME, *others]))

    @classmethod
    def of(cls, recipe: Recipe | Policy | str | Path, **settings: Any) -> Recipe:
        """A recipe as users name it.

        Args:
            recipe: a recipe, a policy, the name of a preset, of a method's recipe or of a policy
                (settings may follow: ``balanced:interval=3,tau_q=.5``), or a path to JSON or YAML.
            settings: further settings.

        Raises:
            ValueError: it is none of these, or a setting is not allowed.
        """
        if isinstance(recipe, Policy):
            recipe = cls(policy=recipe, name=settings.pop("name", "custom"))
        if isinstance(recipe, Recipe):
            return recipe.with_settings(recipe.name, settings) if settings else recipe
        if not isinstance(recipe, (str, Path)):
            raise ValueError(f"recipe must be a Recipe, a name or a path, got {recipe!r}")
        text = str(recipe)
        name = text.partition(":")[0].strip()
        if name in (*presets(), *METHODS):
            base = cls.load(RECIPES / f"{name}.json")
        elif name in policies():
            base = cls(name=name, policy=make_policy(name))
        elif text.endswith((".json", ".yaml", ".yml")) or _exists(text):
            base, text = cls.load(text), ""
        else:
            raise ValueError(
                f"recipe must be a preset ({', '.join(presets())}), a method "
                f"({', '.join(METHODS)}), a policy ({', '.join(policies())}), one of these with "
                f"settings (balanced:interval=3), or a path to a .json or .yaml file, got {text!r}"
            )
        said = parse_settings(text)[1] if text else {}
        for key in settings:
            if key in said:
                raise ValueError(f"{key} is given twice, in {text!r} and as a keyword")
        both = {**said, **settings}
        return base.with_settings(text if said else base.name, both) if both else base


def presets() -> list[str]:
    """Names of the recipes that are recommended; methods of papers are named beside them."""
    return sorted(path.stem for path in RECIPES.glob("*.json") if path.stem not in METHODS)


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):  # a name too long, a null byte
        return False


def _schedule_with(wanted: Mapping[str, Any]) -> Schedule:
    """The one schedule that has all of these settings."""
    fitting = [name for name, cls in schedules().items() if set(wanted) <= set(_names(cls))]
    if len(fitting) != 1:
        several = "no schedule" if not fitting else f"several schedules, {', '.join(fitting)}"
        raise ValueError(
            f"settings {', '.join(wanted)} together belong to {several}: name one, schedule=..."
        )
    return make_schedule(fitting[0], **wanted)


def _names(part: Any) -> list[str]:
    """Names of the settings of a section, a schedule or a policy."""
    return [f.name for f in dataclasses.fields(part) if f.name != "name"]


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _named(what: str, chosen: Any, known: Mapping[str, Any], make: Any) -> Any:
    """``{"name": ..., setting: value}`` as an object."""
    if not isinstance(chosen, Mapping) or not isinstance(chosen.get("name"), str):
        raise ValueError(
            f'{what} must be {{"name": one of {", ".join(known)}, setting: value}}, got {chosen!r}'
        )
    for key in chosen:
        if not isinstance(key, str):
            raise ValueError(f"settings of {what} must have names, got {key!r}")
    return make(**chosen)


def _section(what: str, cls: type, values: Any) -> Any:
    allowed = [f.name for f in dataclasses.fields(cls)]
    if not isinstance(values, Mapping):
        raise ValueError(f"{what} must be an object of {', '.join(allowed)}, got {values!r}")
    for key in values:
        if key not in allowed:
            raise ValueError(f"{what} has {', '.join(allowed)}; got {key!r}")
    return cls(**values)


def _check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
