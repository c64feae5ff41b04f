"""Whole-layer caching as it is defined, block by block, without the engine.

A block that is cached adds what it added when it last ran. Which of its arguments it carries on is
seen in one call of the stock model: what a block returns is, as the same tensor, an argument of the
next one; where the model adds something between, a block that returns one tensor carries on its
first argument. Inputs vary from step to step, so what is kept is not what would be computed.
"""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import torch
from torch import Tensor, nn

SHOWS = 1e-4  # of the output's size: the least that caching must change
Streams = dict[str, int]  # argument -> its place among what a block returns


class ByHand:
    """Stands in for the forward of a block: stock, or its arguments and what it last added."""

    def __init__(self, block: nn.Module) -> None:
        self.forward, self.names = block.forward, list(inspect.signature(block.forward).parameters)
        self.streams: Streams | None = None
        self.cached = False
        self.given: dict[str, Any] = {}
        self.made: tuple[Any, ...] = ()
        self.added: dict[int, Tensor | None] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if self.cached and self.streams is not None:
            return self._forecast(given)
        out = self.forward(*args, **kwargs)
        made = out if isinstance(out, tuple) else (out,)
        if self.streams is None:
            self.given, self.made = given, made
            return out
        self.added = {
            place: None if made[place] is None else made[place] - given[name]
            for name, place in self.streams.items()
        }
        self.plain = not isinstance(out, tuple)
        self.count = len(made)
        return out

    def _forecast(self, given: dict[str, Any]) -> Any:
        assert self.streams is not None
        out: list[Any] = [None] * self.count
        for name, place in self.streams.items():
            added = self.added[place]
            out[place] = None if added is None else given[name] + added
        return out[0] if self.plain else tuple(out)


class Definition:
    """The model with its blocks written out by hand.

    Args:
        model: the stock model.
        inputs: of one call.
        lists: paths of its lists of blocks that may be cached.
        output: calls it: ``output(model, inputs)``.

    Raises:
        LookupError: what the blocks of a list carry on is not handed from one to the next as it
            is, so it has no definition of this form.
    """

    def __init__(self, model: nn.Module, inputs: dict, lists: list[str], output: Any) -> None:
        self.model, self.output = model, output
        self.hands: list[tuple[nn.Module, ByHand]] = []
        try:
            groups = []
            for path in lists:
                blocks = dict.fromkeys(model.get_submodule(path))  # a shared block once
                hands = [(block, ByHand(block)) for block in blocks]
                for block, hand in hands:
                    block.forward = hand
                self.hands += hands
                groups.append((path, [hand for _, hand in hands]))
            output(model, inputs)
            for path, found in groups:
                streams = handed_on(found)
                if not streams:
                    raise LookupError(f"{path}: nothing is handed from block to block as it is")
                for hand in found:
                    hand.streams = streams
                    hand.given, hand.made = {}, ()
        except BaseException:
            self.take_off()
            raise

    def step(self, inputs: dict, cached: bool) -> Tensor:
        """What the model returns in a step."""
        for _, hand in self.hands:
            hand.cached = cached
        return self.output(self.model, inputs)

    def take_off(self) -> None:
        for block, _ in self.hands:
            vars(block).pop("forward", None)


def handed_on(hands: list[ByHand]) -> Streams:
    """Arguments of every later block that are what the one before returned, and at which place."""
    found: Streams | None = None
    for before, after in itertools.pairwise(hands):
        streams = {
            name: place
            for name, value in after.given.items()
            for place, made in enumerate(before.made)
            if isinstance(made, Tensor) and value is made
        }
        found = streams if found is None else found
        if streams != found:
            found = {}
            break
    if not found:  # one block, or the model adds something between: the first argument, then
        first = next(iter(hands[0].given))
        return {first: 0} if all(carries(hand, first) for hand in hands) else {}
    complete = all(
        isinstance(hand.given.get(name), Tensor) and alike(hand.given[name], hand.made[place])
        for hand in hands[:-1] or hands
        for name, place in found.items()
    )
    return found if complete and len(found) == len(hands[0].made) else {}


def carries(hand: ByHand, name: str) -> bool:
    """Whether a block returns one tensor, like that argument."""
    return len(hand.made) == 1 and alike(hand.given.get(name), hand.made[0])


def alike(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape


@torch.no_grad()
def error(
    model: nn.Module, given: list[dict], lists: list[str], cached: list[bool], got: list[Tensor],
    output: Any,
) -> float:  # fmt: skip
    """The largest difference of steps from the definition, as a share of the output's size.

    Args:
        model: the stock model.
        given: inputs of each step.
        lists: paths of the lists whose blocks were cached.
        cached: in which steps.
        got: what the accelerated model returned.
        output: calls it.

    Raises:
        LookupError: there is no definition of this form.
    """
    stock = [output(model, inputs) for inputs in given]
    hand = Definition(model, given[0], lists, output)
    try:
        expected = [hand.step(inputs, skips) for inputs, skips in zip(given, cached, strict=True)]
    finally:
        hand.take_off()
    scale = max(float(x.abs().max()) for x in expected)
    if (
        max(float((a - b).abs().max()) for a, b in zip(stock, expected, strict=True))
        < SHOWS * scale
    ):
        raise LookupError("what is kept is what would be computed: nothing shows")
    return max(float((a - b).abs().max()) / scale for a, b in zip(got, expected, strict=True))
