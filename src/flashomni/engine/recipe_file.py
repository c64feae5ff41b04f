"""Recipe files: JSON or YAML in, checked before anything believes them; format 1 made format 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MAX_BYTES = 1 << 20
MAX_DEPTH = 20
SCHEDULE = ("interval", "warmup")
FORECAST = ("order", "layer_order")
STORAGE = ("history_dtype", "history_device")
SPARSE = ("degrade_below", "min_skip", "block_m", "block_n")


def read_recipe(path: Path) -> Any:
    """What a recipe file holds.

    Raises:
        ValueError: it is missing, too large, no JSON or YAML, has a key twice, a number that is
            not finite or absurdly long, or is nested too deep; the message names the file.
    """
    try:
        if path.is_file() and path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES} bytes")
        text = path.read_text(encoding="utf-8-sig")
        data = _yaml(text) if path.suffix in (".yaml", ".yml") else _json(text)
        _check_depth(data)
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ValueError(f"recipe {path} cannot be read: {error or 'nested too deep'}") from error
    return data


def _json(text: str) -> Any:
    def refuse(name: str) -> Any:
        raise ValueError(f"numbers must be finite, got {name}")

    return json.loads(text, object_pairs_hook=_unique, parse_constant=refuse)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key!r} is given twice")
        result[key] = value
    return result


def _yaml(text: str) -> Any:
    import yaml  # type: ignore[import-untyped]

    class Loader(yaml.SafeLoader):
        """Refuses keys that are given twice, and aliases, which could grow without bound."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.events.AliasEvent):
                raise ValueError("aliases (*name) are not allowed")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            pairs = [(self.construct_object(k, True), v) for k, v in node.value]
            _unique([(str(key), None) for key, _ in pairs])
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)  # a SafeLoader: plain data only
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _check_depth(data: Any) -> None:
    level = [data]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for value in level
            if isinstance(value, (dict, list))
            for child in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise ValueError(f"it is nested more than {MAX_DEPTH} deep")


def upgrade(data: dict[str, Any], newest: int) -> dict[str, Any]:
    """A recipe of any format in the newest, without its ``format``.

    Raises:
        ValueError: the format is none there is.
    """
    version = data.pop("format", newest)
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= newest:
        raise ValueError(f"format of a recipe must be from 1 to {newest}, got {version!r}")
    return data if version == newest else _from_1(data)


def _from_1(old: dict[str, Any]) -> dict[str, Any]:
    """Format 1 was flat, and named two methods by a policy."""
    known = (*SCHEDULE, *FORECAST, *STORAGE, *SPARSE, "forecast", "name", "policy")
    for key in old:
        if key not in known:
            raise ValueError(f"a recipe of format 1 has {', '.join(known)}; got {key!r}")
    policy = old.get("policy")
    if isinstance(policy, dict) and policy.get("name") in ("fora", "taylorseer"):
        policy = {**policy, "name": "cached"}
    new: dict[str, Any] = {"policy": policy}
    if "name" in old:
        new["name"] = old["name"]
    new["schedule"] = {"name": "interval", **_taken(old, SCHEDULE)}
    new["forecast"] = _taken(old, FORECAST)
    if "forecast" in old:
        new["forecast"]["name"] = old["forecast"]
    new["storage"], new["sparse"] = _taken(old, STORAGE), _taken(old, SPARSE)
    return new


def _taken(old: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: old[key] for key in keys if key in old}
