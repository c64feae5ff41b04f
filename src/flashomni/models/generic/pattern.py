"""What follows from one watched call: the streams of each block, or why its list is not cached."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from flashomni.models import Site
from flashomni.models.generic.watch import Seen


@dataclass
class Learned:
    """What is known of one sort of call.

    Attributes:
        sites: of the blocks that may be cached whole, by number.
        refused: why the blocks of a list are computed in every step, by the list's path.
        attention: place of the attention that runs on our op among those of a block, by number.
        own: why the largest attention of a block is the model's own, by number.
        order: numbers of the blocks as they ran.
    """

    sites: dict[int, Site] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    attention: dict[int, int] = field(default_factory=dict)
    own: dict[int, str] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)


class Refused(Exception):
    """A block cannot be cached; the message says why."""


Votes = dict[tuple[type, int, int], Counter[str]]


def learn(
    seen: Sequence[Seen], blocks: Sequence[tuple[str, nn.Module]], lists: Sequence[str], chain: bool
) -> Learned:
    """What a watched call shows.

    Args:
        seen: the calls of blocks, in order.
        blocks: path and module of each block, by number.
        lists: path of the list that each is in.
        chain: whether blocks may be chained where nothing speaks against it.
    """
    learned, votes = Learned(), _votes(seen, blocks)
    calls = Counter(each.number for each in seen)
    for place, each in enumerate(seen):
        number = each.number
        path, block = blocks[number]
        if number in learned.order:
            continue
        learned.order.append(number)
        try:
            if calls[number] > 1:
                raise Refused(f"it is called {calls[number]} times in one call of the model")
            streams, returns = _streams(each, block, votes)
            chained = chain and not _is_read(each, seen[place + 1 : place + 2])
            learned.sites[number] = Site(path, block, _by_itself, streams, returns, chained)
        except Refused as reason:
            learned.refused.setdefault(lists[number], f"{path}: {reason}")
        _choose_attention(learned, each)
    for number in [n for n in learned.sites if lists[n] in learned.refused]:
        del learned.sites[number]
    return learned


def leave_out_short(learned: Learned, seen: Sequence[Seen], lists: Sequence[str]) -> None:
    """Cache only the lists that run on all tokens: for schedules that look at the first block.

    A refiner of the text, say, sees the same in every step, and would show that nothing changes.
    """
    tokens: Counter[str] = Counter()  # of a list: the most that one of its blocks returns
    for each in seen:
        if each.number in learned.sites:
            path, count = lists[each.number], sum(x[0][:-1].numel() for x in each.outputs if x)
            tokens[path] = max(tokens[path], count)
    nearly_all = 0.98 * max(tokens.values(), default=0)
    for number in [n for n in learned.sites if tokens[lists[n]] < nearly_all]:
        del learned.sites[number]
        reason = "the schedule looks at the first block, and others see more tokens than it"
        learned.refused.setdefault(lists[number], reason)


def _by_itself(*_: object) -> None:
    """A block of a learned site runs by its own forward."""


def _votes(seen: Sequence[Seen], blocks: Sequence[tuple[str, nn.Module]]) -> Votes:
    """How often an output became which argument of the next block of the same class."""
    votes: Votes = {}
    for each, after in itertools.pairwise(seen):
        cls = type(blocks[each.number][1])
        if type(blocks[after.number][1]) is cls:
            for position, name in each.handed.items():
                key = cls, len(each.outputs), position
                votes.setdefault(key, Counter())[name] += 1
    return votes


def _streams(
    seen: Seen, block: nn.Module, votes: Votes
) -> tuple[tuple[str, ...], str | tuple[str | None, ...]]:
    """The arguments that a block's outputs carry on, and what it returns in their terms."""
    if seen.problem:
        raise Refused(seen.problem)
    names: list[str | None] = []
    for position, output in enumerate(seen.outputs):
        if output is None:
            names.append(None)
            continue
        alike = [name for name, meta in seen.inputs.items() if meta == output]
        voted = votes.get((type(block), len(seen.outputs), position))
        if voted:
            name = voted.most_common(1)[0][0]
            if name not in alike:
                raise Refused(f"output {position} goes on as {name}, but is {_words(output)}")
        else:
            name = _only(alike, seen, block, position, output)
        names.append(name)
    streams = tuple(name for name in names if name is not None)
    if not streams:
        raise Refused("it returns nothing")
    if len(set(streams)) < len(streams):
        raise Refused(f"two of its outputs go on as {streams[0]}")
    return streams, (streams[0] if seen.kind is Tensor else tuple(names))


def _only(alike: list[str], seen: Seen, block: nn.Module, position: int, output: tuple) -> str:
    """The argument that an output carries on, where the flow does not say it."""
    if len(alike) == 1:
        return alike[0]
    if len(seen.outputs) == 1 and alike and alike[0] == next(iter(seen.inputs)):
        return alike[0]
    returned = _returned_names(type(block))
    if len(returned) == len(seen.outputs) and returned[position] in alike:
        return str(returned[position])
    choice = " or ".join(alike) or "none of its arguments"
    raise Refused(f"output {position}, {_words(output)}, could carry on {choice}")


def _returned_names(cls: type) -> list[str | None]:
    """The variables of the last ``return`` of a class's forward."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls.forward)))  # type: ignore[attr-defined]
    except (OSError, TypeError, SyntaxError):
        return []
    values = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return) and node.value]
    if not values:
        return []
    last = max(values, key=lambda value: value.lineno)
    parts = last.elts if isinstance(last, ast.Tuple) else [last]
    return [part.id if isinstance(part, ast.Name) else None for part in parts]


def _is_read(seen: Seen, after: Sequence[Seen]) -> bool:
    """Whether others read what a block hands to the next one as it is."""
    return seen.others and bool(after) and bool(seen.handed)


def _choose_attention(learned: Learned, seen: Seen) -> None:
    """The largest attention of a block that can run here."""
    if not seen.attention:
        learned.own[seen.number] = "it does not call F.scaled_dot_product_attention"
        return
    ours = [i for i, each in enumerate(seen.attention) if each.why_not is None]
    largest = max(seen.attention, key=lambda each: each.size)
    if ours:
        learned.attention[seen.number] = max(ours, key=lambda i: seen.attention[i].size)
    else:
        learned.own[seen.number] = str(largest.why_not)


def mismatch(site: Site, inputs: Mapping[str, Tensor], output: object) -> str | None:
    """What a block returned that it would not have by what was learned; ``None`` if nothing."""
    names: tuple[str | None, ...] = site.streams
    parts: tuple = (output,)
    if not isinstance(site.returns, str):
        if not isinstance(output, tuple):
            return f"it returned a {type(output).__name__}"
        names, parts = site.returns or names, output
    if len(parts) != len(names):
        return f"it returned {len(parts)} values, not {len(names)}"
    for part, name in zip(parts, names, strict=True):
        if name is None and part is None:
            continue
        if name is None or not isinstance(part, Tensor):
            return f"it returned a {type(part).__name__} for {name}"
        if (part.shape, part.dtype) != (inputs[name].shape, inputs[name].dtype):
            return f"it returned {_words((part.shape, part.dtype))} for {name}"
    return None


def _words(meta: tuple) -> str:
    shape, dtype = meta
    return f"{list(shape)} of {str(dtype).removeprefix('torch.')}"
