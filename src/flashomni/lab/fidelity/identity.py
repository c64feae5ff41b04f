"""What a result depends on besides its settings: weights, tokenizers, other people's code."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OnBytes = Callable[[int, int], None]
PLAIN = (str, bytes, int, float, bool, tuple, type(None))


def _nothing(done: int, total: int) -> None:
    pass


def weights_digest(pipe: Any, on_bytes: OnBytes = _nothing) -> str:
    """Hash of every weight, setting and vocabulary that the pipeline holds.

    Args:
        pipe: a diffusers pipeline; its weights may be offloaded.
        on_bytes: told how many bytes of how many have been read.
    """
    digest, done = hashlib.sha256(), 0
    modules = {k: v for k, v in pipe.components.items() if isinstance(v, torch.nn.Module)}
    total = sum(x.nbytes for part in modules.values() for x in part.state_dict().values())
    for name, part in sorted(pipe.components.items()):
        digest.update(f"{name} {type(part).__name__} ".encode() + _settings(part))
        if name not in modules:
            digest.update(_vocabulary(part))
            continue
        for key, tensor in part.state_dict().items():
            digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
            for raw in _stored(_offloaded(part, key) if tensor.is_meta else tensor):
                digest.update(raw)
            done += tensor.nbytes
            on_bytes(done, total)
    return digest.hexdigest()[:16]


def _stored(tensor: Tensor | None) -> Iterator[Any]:
    """The bytes of a tensor, or of the parts that a quantised one consists of."""
    if tensor is None or tensor.is_meta:
        return  # nothing to read: its name, shape and dtype are all that is known
    if type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
        if hasattr(tensor, "__tensor_flatten__"):
            names, context = tensor.__tensor_flatten__()
            yield repr(context).encode()
            for name in names:
                yield from _stored(getattr(tensor, name))
            return
        tensor = tensor.dequantize() if hasattr(tensor, "dequantize") else tensor
    yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _offloaded(module: torch.nn.Module, key: str) -> Tensor | None:
    """A weight that accelerate's hooks keep elsewhere while the module holds an empty one."""
    path, _, name = key.rpartition(".")
    hook: Any = getattr(module.get_submodule(path), "_hf_hook", None)
    for part in (hook, *getattr(hook, "hooks", ())):
        weights = getattr(part, "weights_map", None)
        if weights is not None and name in weights:
            return weights[name]
    return None


def _settings(part: Any) -> bytes:
    """Configuration of a part, without what libraries note in it: names, versions, sets."""
    config: Any = getattr(part, "config", None)
    if callable(getattr(config, "to_dict", None)):
        config = config.to_dict()
    items = dict(config).items() if isinstance(config, Mapping) else ()
    noted = {key: value for key, value in items if not str(key).startswith("_")}
    noted.pop("transformers_version", None)
    return json.dumps(noted, sort_keys=True, default=str).encode()


def _vocabulary(part: Any) -> bytes:
    """What a tokenizer does with text, or the settings of another part that has no weights."""
    found: dict[str, Any] = {
        name: getattr(part, name, None)
        for name in ("model_max_length", "padding_side", "special_tokens_map", "chat_template")
    }
    fast: Any = getattr(part, "backend_tokenizer", None)
    if hasattr(fast, "to_str"):
        # truncation and padding are how it was last called
        found["fast"] = {**json.loads(fast.to_str()), "truncation": None, "padding": None}
    elif callable(getattr(part, "get_vocab", None)):
        found["vocabulary"] = sorted(part.get_vocab().items())
        found["merges"] = getattr(part, "bpe_ranks", None)
    elif not hasattr(part, "config") and callable(getattr(part, "to_dict", None)):
        found["settings"] = part.to_dict()  # an image processor
    return json.dumps({k: str(v) for k, v in found.items()}, sort_keys=True).encode()


def code_of(thing: Any) -> str:
    """Name of a function or a class, and a hash of the file that defines it.

    What its file imports is not looked at, but plain values that a closure or a ``partial`` holds
    are.
    """
    digest = hashlib.sha256()
    while isinstance(thing, partial):
        digest.update(repr((_plain(thing.args), _plain(thing.keywords.items()))).encode())
        thing = thing.func
    if not inspect.isroutine(thing) and not isinstance(thing, type):
        digest.update(repr(_plain(sorted(getattr(thing, "__dict__", {}).items()))).encode())
        thing = type(thing)
    thing = inspect.unwrap(getattr(thing, "__func__", thing))
    code = getattr(thing, "__code__", None)
    if code is not None:
        digest.update(code.co_code + repr((code.co_names, _plain(code.co_consts))).encode())
        cells = [_content(cell) for cell in getattr(thing, "__closure__", None) or ()]
        digest.update(repr(_plain(cells)).encode())
    try:
        source = inspect.getsourcefile(thing)
        digest.update(Path(source).read_bytes() if source else b"")
    except (TypeError, OSError):  # built in, or typed at a prompt
        pass
    name = getattr(thing, "__qualname__", repr(thing))
    return f"{getattr(thing, '__module__', None)}:{name} {digest.hexdigest()[:12]}"


def foreign_code(things: Iterable[Any]) -> dict[str, str]:
    """:func:`code_of` the classes of what FlashOmni has not defined itself, and its versions."""
    found = {}
    for thing in things:
        cls = thing if isinstance(thing, type) or inspect.isfunction(thing) else type(thing)
        top = cls.__module__.partition(".")[0]
        if top not in ("flashomni", "builtins") and top not in sys.stdlib_module_names - {
            "__main__"
        }:
            code = code_of(cls)
            found[code.partition(" ")[0]] = f"{code} {' '.join(package_versions(top))}".strip()
    return found


def package_versions(module: str) -> list[str]:
    """``name==version`` of the distributions that an importable module comes with."""
    found = []
    for name in sorted(set(_distributions(tuple(sys.path)).get(module, []))):
        try:
            found.append(f"{name}=={version(name)}")
        except PackageNotFoundError:
            continue
    return found


@cache
def _distributions(path: tuple[str, ...]) -> Mapping[str, list[str]]:
    """Distributions by importable module; looking through all of them takes half a second."""
    return packages_distributions()


def _plain(values: Iterable[Any]) -> list[Any]:
    """Values whose text says what they are: others have an address in it."""
    return [
        _plain(value) if isinstance(value, tuple) else value
        for value in values
        if isinstance(value, PLAIN)
    ]


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None
