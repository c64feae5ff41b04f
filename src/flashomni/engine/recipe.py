"""A recipe: policy + schedule + forecast + storage. Data, with a JSON round trip; no code in it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashomni.engine.forecasts import forecasts
from flashomni.engine.schedules.interval import Schedule
from flashomni.engine.state.storage import DTYPES
from flashomni.policies import Policy, check_int, check_range, make_policy, policies
from flashomni.util.files import write_text
from flashomni.util.settings import parse_settings

FORMAT = 1
PRESETS = Path(__file__).parent.parent / "recipes"
HISTORY_DTYPES = ("compute", *DTYPES)
HISTORY_DEVICES = ("compute", "host")
_NOT_SETTINGS = ("name", "policy")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what is computed, cached and skipped.

    Args:
        name: what reports call it.
        policy: chooses the symbols on Update steps.
        interval: N: one Update, then N - 1 Dispatch steps.
        warmup: share of the steps that run dense first, 0 to 1.
        forecast: basis that carries cached tiles forward (``flashomni show recipe`` lists them).
        order: forecast order of cached tiles, 0 to 3.
        layer_order: forecast order of layers that are cached whole, 0 to 3.
        degrade_below: S_q: a layer whose computed fraction is this or less is cached whole,
            attention and MLP, until it rises again; 0 never does that.
        min_skip: a row that would skip less than this share of its key blocks visits all of them:
            below break-even, skipping costs more than it saves.
        block_m: query tokens per block.
        block_n: key tokens per block.
        history_dtype: storage of histories and bias terms: ``compute``, ``bfloat16``, ``float16``,
            ``float8`` (a scale for each token; it halves the memory and costs precision).
        history_device: ``compute`` keeps histories and bias terms of tiles beside the model,
            ``host`` in pinned host memory: a layer's are on the device while it and the layer
            before it run.

    Raises:
        ValueError: a value is out of range; the message names the field and what is allowed.
    """

    policy: Policy
    name: str = "custom"
    interval: int = 6
    warmup: float = 0.16
    forecast: str = "taylor"
    order: int = 1
    layer_order: int = 0
    degrade_below: float = 0.0
    min_skip: float = 0.0
    block_m: int = 128
    block_n: int = 128
    history_dtype: str = "compute"
    history_device: str = "compute"
    _schedule: Schedule = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.policy, Policy):
            raise ValueError(f"policy must be a Policy, got {self.policy!r}")
        self.policy.to_dict()  # refuses one that could not be found again, before it is used
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name must be a non-empty string, got {self.name!r}")
        check_int("interval", self.interval, 1, 1000)
        check_range("warmup", self.warmup, 0.0, 1.0)
        _check_choice("forecast", self.forecast, tuple(forecasts()))
        check_int("order", self.order, 0, 3)
        check_int("layer_order", self.layer_order, 0, 3)
        check_range("degrade_below", self.degrade_below, 0.0, 1.0)
        check_range("min_skip", self.min_skip, 0.0, 1.0)
        for name in ("block_m", "block_n"):
            check_int(name, getattr(self, name), 16, 1024)
            if getattr(self, name) % 16:
                raise ValueError(f"{name} must be a multiple of 16, got {getattr(self, name)}")
        _check_choice("history_dtype", self.history_dtype, HISTORY_DTYPES)
        _check_choice("history_device", self.history_device, HISTORY_DEVICES)
        order = max(self.order, self.layer_order)
        object.__setattr__(self, "_schedule", Schedule(self.interval, self.warmup, order))

    @property
    def schedule(self) -> Schedule:
        return self._schedule

    def replace(self, **changes: Any) -> Recipe:
        """This recipe with other values; it is checked again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """JSON values only; :meth:`from_dict` gives the same recipe back."""
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        return {"format": FORMAT, **settings, "policy": self.policy.to_dict()}

    @classmethod
    def from_dict(cls, data: Any) -> Recipe:
        """The inverse of :meth:`to_dict`; what is left out keeps its default."""
        if not isinstance(data, Mapping):
            raise ValueError(f"a recipe must be a JSON object, got {type(data).__name__}")
        settings = dict(data)
        version = settings.pop("format", FORMAT)
        if version != FORMAT:
            raise ValueError(f"format of a recipe must be {FORMAT}, got {version!r}")
        allowed = [f.name for f in dataclasses.fields(cls) if f.init]
        for key in settings:
            if key not in allowed:
                raise ValueError(f"a recipe has {', '.join(allowed)}; got {key!r}")
        chosen = settings.get("policy")
        if not isinstance(chosen, Mapping) or not isinstance(chosen.get("name"), str):
            known = ", ".join(policies())
            raise ValueError(
                f'policy must be {{"name": one of {known}, setting: value}}, got {chosen!r}'
            )
        return cls(**{**settings, "policy": make_policy(**chosen)})

    def save(self, path: str | Path) -> None:
        """Write JSON; the file appears whole or not at all."""
        write_text(path, json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file is missing, not JSON, or not a recipe.
        """
        path = Path(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"recipe {path} cannot be read: {error}") from error
        try:
            return cls.from_dict(data)
        except (TypeError, ValueError) as error:
            raise ValueError(f"recipe {path}: {error}") from error

    def with_settings(self, name: str, settings: Mapping[str, Any]) -> Recipe:
        """This recipe under another name, with some of its own or its policy's settings replaced.

        Raises:
            ValueError: a key is a setting of neither, or a value is not allowed.
        """
        own = [f.name for f in dataclasses.fields(self) if f.init and f.name not in _NOT_SETTINGS]
        policy = self.policy.to_dict()
        for key, value in settings.items():
            if key not in own and (key not in policy or key in _NOT_SETTINGS):
                allowed = own + [known for known in policy if known not in _NOT_SETTINGS]
                raise ValueError(f"settings of {self.name} are {', '.join(allowed)}; got {key!r}")
            if key not in own:
                policy[key] = value
        changes = {key: value for key, value in settings.items() if key in own}
        return self.replace(name=name, policy=make_policy(**policy), **changes)

    @classmethod
    def of(cls, recipe: Recipe | str | Path) -> Recipe:
        """A recipe as users name it: an object, a preset, a policy, or a path to JSON.

        Settings may follow the name of a preset or a policy: ``balanced:interval=3,tau_q=.5``.

        Raises:
            ValueError: it is none of these.
        """
        if isinstance(recipe, Recipe):
            return recipe
        if not isinstance(recipe, (str, Path)):
            raise ValueError(f"recipe must be a Recipe, a name or a path, got {recipe!r}")
        text = str(recipe)
        name = text.partition(":")[0].strip()
        if name in presets():
            base = cls.load(PRESETS / f"{name}.json")
        elif name in policies():
            base = cls(name=name, policy=make_policy(name), **policies()[name].recipe)
        elif text.endswith(".json") or Path(text).exists():
            return cls.load(text)
        else:
            raise ValueError(
                f"recipe must be a preset ({', '.join(presets())}), a policy "
                f"({', '.join(policies())}), one of these with settings (balanced:interval=3), or "
                f"a path to a .json file, got {text!r}"
            )
        settings = parse_settings(text)[1]
        return base.with_settings(text, settings) if settings else base


def presets() -> list[str]:
    """Names of the recipes that come with the library."""
    return sorted(path.stem for path in PRESETS.glob("*.json"))


def _check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
