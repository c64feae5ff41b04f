"""Where the blocks of a model are, and what is declared about them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from flashomni.models.generic.declared import DECLARED

TEXT = (None, "first", "last")


@dataclass(frozen=True)
class Blocks:
    """What is known of the blocks of a model that has no adapter.

    Args:
        lists: its lists of blocks, as modules or by their paths, in any order; by default every
            outermost ``ModuleList`` whose members all hold an attention.
        text: where the text is in the sequence that attention sees: ``first``, ``last``, or
            ``None`` where it is not in it (cross-attention) or nobody knows.
        text_from: the argument of a block, or else of the model, whose tokens are counted for it.
        chain: whether blocks may be cached in one with their neighbours; ``False`` where something
            but the next block reads what a block returns, and watching a call does not show it.

    Raises:
        ValueError: a value is not allowed.
    """

    lists: Sequence[nn.Module | str] = ()
    text: str | None = None
    text_from: str = "encoder_hidden_states"
    chain: bool = True

    def __post_init__(self) -> None:
        if self.text not in TEXT:
            raise ValueError(f"text must be 'first', 'last' or None, got {self.text!r}")
        if isinstance(self.lists, (str, nn.Module)) or not all(
            isinstance(each, (str, nn.Module)) for each in self.lists
        ):
            raise ValueError(
                "lists must be a sequence of lists of blocks, as modules or by their paths, got "
                f"{type(self.lists).__name__}"
            )


def declared() -> dict[str, Blocks]:
    """What the table says, by the names of the classes (tier B)."""
    return {name: Blocks(**said) for name, said in DECLARED.items()}


def find_blocks(model: nn.Module, blocks: Blocks) -> dict[str, list[tuple[str, nn.Module]]]:
    """The blocks of each list, with their paths in the model; a shared block once.

    Raises:
        ValueError: a list that was given is none of the model's, or is no list of blocks.
    """
    lists = _given(model, blocks.lists) if blocks.lists else _outermost(model, "")
    return {
        path: [(f"{path}.{i}", block) for i, block in enumerate(_once(members))]
        for path, members in lists
    }


def _given(model: nn.Module, lists: Iterable[nn.Module | str]) -> Iterator[tuple[str, Any]]:
    paths = {id(module): path for path, module in model.named_modules()}
    modules = dict(model.named_modules())
    for each in lists:
        module = modules.get(each) if isinstance(each, str) else each
        path = paths.get(id(module))
        if module is None or path is None:
            raise ValueError(f"lists must hold lists of the model's blocks, got {each!r}")
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or not len(module):
            raise ValueError(
                f"lists must hold a ModuleList or a Sequential of blocks, {path} is a "
                f"{type(module).__name__}"
            )
        yield path, module


def _outermost(module: nn.Module, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList) and len(child) and all(map(_is_block, child)):
            yield path, child
        else:
            yield from _outermost(child, f"{path}.")


def _is_block(module: nn.Module) -> bool:
    """Whether a module can be called, and something below it is an attention."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return False
    return any(
        hasattr(part, "processor") or _names_attention(name.rpartition(".")[2], part)
        for name, part in module.named_modules()
        if part is not module
    )


def _names_attention(name: str, module: nn.Module) -> bool:
    words = f"{name} {type(module).__name__}".lower()
    return "attn" in words or "attention" in words


def _once(members: Iterable[nn.Module]) -> list[nn.Module]:
    return list({id(member): member for member in members}.values())
