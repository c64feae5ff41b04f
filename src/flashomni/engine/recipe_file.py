"""Recipe files: JSON or YAML in, checked before anything believes them; format 1 made format 2."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MAX_BYTES = 1 << 20
MAX_DEPTH = 8
MAX_DIGITS = 20  # of an integer in JSON; what is longer is no setting
SCHEDULE = ("interval", "warmup")
FORECAST = ("order", "layer_order")
STORAGE = ("history_dtype", "history_device")
SPARSE = ("degrade_below", "min_skip", "block_m", "block_n")
FLAT = (*SCHEDULE, *FORECAST, *STORAGE, *SPARSE)
METHODS: dict[str, dict[str, Any]] = {  # policies of format 1, and what they asked for
    "fora": {"order": 0, "layer_order": 0, "degrade_below": 1.0},
    "taylorseer": {"layer_order": 1, "degrade_below": 1.0},
}


def read_recipe(path: Path) -> Any:
    """What a recipe file holds.

    Raises:
        ValueError: it is missing, no file, too large, no JSON or YAML, or has a key twice; the
            message names the file.
    """
    try:
        text = _text(path)
        return _yaml(text) if path.suffix.lower() in (".yaml", ".yml") else _json(text)
    except RecursionError as error:
        raise ValueError(f"recipe {path} cannot be read: it is nested too deep") from error
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"recipe {path} cannot be read: {error}") from error


def _text(path: Path) -> str:
    if path.exists() and not path.is_file():  # a pipe would keep us waiting, a device never end
        raise ValueError("it is no file")
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES} bytes")
    return content.decode("utf-8-sig")


def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique, parse_int=_integer)


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= MAX_DIGITS else float(digits)


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key!r} is given twice")
        result[key] = value
    return result


def _yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses keys that are given twice, and aliases, which could grow without bound."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.events.AliasEvent):
                raise ValueError("aliases (*name) are not allowed")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            _unique([(f"{key}", None) for key in keys])
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)  # a SafeLoader: plain data only
    except RecursionError:
        raise
    except Exception as error:  # the constructors of tagged scalars raise whatever they like
        raise ValueError(f"{type(error).__name__}: {error}") from error


def plain(value: Any, where: str, depth: int = 0) -> Any:
    """JSON values only, lists as tuples.

    Args:
        value: of a recipe.
        where: what errors call it.
        depth: how deep it lies.

    Raises:
        ValueError: a key is no string, a number is not finite or needs more than 64 bits, something
            is no JSON value, or it is nested too deep.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"{where} is nested too deep: at most {MAX_DEPTH} levels")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"keys of {where} must be strings, got {key!r}")
        inside = where + "." if depth else ""
        return {key: plain(item, f"{inside}{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(plain(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value))
    if isinstance(value, int) and value.bit_length() > 64:
        raise ValueError(f"{where} must be a number of at most 64 bits, got a longer one")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} must be a number that is finite, got {value}")
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise ValueError(
        f"{where} must be a number, a string, true, false, null, a list or an object, got {value!r}"
    )


def upgrade(data: dict[str, Any], newest: int) -> dict[str, Any]:
    """A recipe of any format in the newest, without its ``format``.

    Without one, a recipe that has a key of format 1 alone is of that.

    Raises:
        ValueError: the format is none there is.
    """
    version = data.get("format", 1 if _is_flat(data) else newest)
    data = {key: value for key, value in data.items() if key != "format"}
    if type(version) is not int or version not in (1, newest):
        raise ValueError(f"format of a recipe must be 1 or {newest}, got {version!r}")
    return data if version == newest else _from_1(data)


def _is_flat(data: Mapping[str, Any]) -> bool:
    is_old = isinstance(data.get("forecast"), str) or _method(data.get("policy")) is not None
    return is_old or any(key in data for key in FLAT)


def _method(policy: Any) -> str | None:
    """The method that format 1 named by a policy."""
    name = policy.get("name") if isinstance(policy, Mapping) else None
    return name if isinstance(name, str) and name in METHODS else None


def _from_1(old: dict[str, Any]) -> dict[str, Any]:
    """Format 1 was flat, and named two methods by a policy."""
    known = ("name", "policy", "forecast", *FLAT)
    for key in old:
        if key not in known:
            raise ValueError(f"a recipe of format 1 has {', '.join(known)}; got {key!r}")
    new: dict[str, Any] = {key: old[key] for key in ("name", "policy") if key in old}
    method = _method(old.get("policy"))
    if method is not None:
        new["policy"] = {**old["policy"], "name": "cached"}
        old = {**METHODS[method], **old}
    new["schedule"] = {"name": "interval", **_taken(old, SCHEDULE)}
    new["forecast"] = _taken(old, FORECAST)
    if "forecast" in old:
        new["forecast"]["name"] = old["forecast"]
    new["storage"], new["sparse"] = _taken(old, STORAGE), _taken(old, SPARSE)
    return new


def _taken(old: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: old[key] for key in keys if key in old}
