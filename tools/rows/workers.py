"""Processes that make pictures, each of its own share of the prompts with every method in turn.

So each makes the stock pipeline's pictures of its prompts once, and a row is there as soon as all
have passed its method. They stay for the next model: starting one takes longer than many a method.
"""

from __future__ import annotations

import argparse
import math
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import connection, get_context
from typing import Any, NamedTuple

import torch

from flashomni.lab.fidelity.compare import References, compare
from flashomni.lab.fidelity.comparison import Comparison, Picture

from .ready import Listed, Ready

LATE = 15.0  # seconds that a process has for the method that it is at when the time is up
AGAIN = 2  # times that a process which has died is started once more


class Asked(NamedTuple):
    """What a process is told to do: the methods from ``first`` on, until ``until`` (time.time)."""

    model: str
    count: int
    batch: int
    listed: list[Listed]
    first: int
    until: float


class Workers:
    """``jobs`` processes, to be closed: ``with Workers(...) as workers``.

    Args:
        jobs: how many.
        options: of the command; ``device``, ``dtype``, ``size``, ``steps``, ``seeds``,
            ``flip`` are read.
    """

    def __init__(self, jobs: int, options: argparse.Namespace) -> None:
        self.jobs, self.options = jobs, options
        self._context = get_context("spawn")
        self._running: dict[int, tuple[Any, Any]] = {}
        for number in range(jobs):
            self._start(number)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close(0.0 if raised[0] else LATE)

    def _start(self, number: int) -> connection.Connection:
        self._end(number)
        mine, theirs = self._context.Pipe()
        work = (theirs, number, self.jobs, self.options)
        process = self._context.Process(target=_work, args=work, daemon=True)
        process.start()
        theirs.close()  # theirs alone, so that their end is seen here
        self._running[number] = (process, mine)
        return mine

    def _end(self, number: int, seconds: float = 0.0) -> None:
        """Leave nothing of a process, neither itself nor its line.

        Args:
            number: of the process; one that does not run is no matter.
            seconds: that it has to end by itself, once its line is closed.
        """
        if number not in self._running:
            return
        process, line = self._running.pop(number)
        line.close()
        process.join(seconds)
        process.kill()
        process.join()
        process.close()

    def looked(self, asked: Asked, tell: Callable[[str, int], None]) -> Comparison:
        """Pictures of the methods that every process has passed before the time was up."""
        start = time.perf_counter()
        shares = min(self.jobs, asked.count)
        found: list[dict[int, list[Picture]]] = [{} for _ in range(shares)]
        left, again = {}, [AGAIN] * shares
        for number in range(shares):
            process, line = self._running.get(number, (None, None))
            if process is None or not process.is_alive():
                line = self._start(number)
            line.send(asked)
            left[line] = number
        while left:
            seconds = max(asked.until + LATE - time.time(), 0.0)
            heard = connection.wait(list(left), None if math.isinf(seconds) else seconds)
            for line in heard:
                number = left[line]
                try:
                    place, pictures = line.recv()
                except (EOFError, OSError):  # it has died at the method behind the last it told of
                    del left[line]
                    first = max(found[number], default=-1) + 2
                    print(f"process {number} ended, goes on at {first}", flush=True)
                    if again[number] and first < len(asked.listed):
                        again[number] -= 1
                        found[number][first - 1] = []
                        line = self._start(number)
                        line.send(asked._replace(first=first))
                        left[line] = number
                    continue
                if place is None:
                    del left[line]
                    continue
                found[number][place] = pictures
                tell(asked.listed[place].called, sum(place in each for each in found))
            if not heard:
                break
        for number in left.values():  # too late
            self._end(number)
        pictures, left_out = [], []
        for place, each in enumerate(asked.listed):
            if all(share.get(place) for share in found):
                pictures += [picture for share in found for picture in share[place]]
            else:
                left_out.append(each.called)
        spent = time.perf_counter() - start
        return Comparison((), tuple(pictures), tuple(left_out), spent)

    def close(self, seconds: float = LATE) -> None:
        """End them; each has so many seconds to end by itself."""
        for _, line in self._running.values():
            line.close()  # all of them first: they end side by side
        for number in list(self._running):
            self._end(number, seconds)


def _work(line: Any, number: int, jobs: int, options: argparse.Namespace) -> None:
    """One of the processes, until its line is closed."""
    torch.set_num_threads(max(torch.get_num_threads() // jobs, 1))  # of cores it may use
    if options.device == "cuda":
        torch.set_float32_matmul_precision("high")
    while True:
        try:
            asked: Asked = line.recv()
        except EOFError:
            return
        shares = min(jobs, asked.count)
        ready = Ready.of(asked.model, options, asked.count)
        mine = ready._replace(prompts=ready.prompts[number::shares])
        references: References = {}
        if options.device == "cuda" and not asked.first:
            _compiled(mine, asked, options, asked.listed[number::shares])
        for place in range(asked.first, len(asked.listed)):
            if time.time() > asked.until:
                break
            pictures: list[Picture] = []
            try:
                pictures = _pictures(mine, asked, options, asked.listed[place], references)
            except Exception:  # one that fails must not take the others with it
                print(f"{asked.listed[place].name} failed", flush=True)
                traceback.print_exc()
                if options.device == "cuda":
                    torch.cuda.synchronize()  # raises where this process has no device any more
            line.send(
                (
                    place,
                    [replace(each, prompt=each.prompt * shares + number) for each in pictures],
                )
            )
        line.send((None, None))


def _compiled(
    ready: Ready, asked: Asked, options: argparse.Namespace, listed: list[Listed]
) -> None:
    """Generate once with some of the methods, so that each compiles other kernels for all."""
    for each in listed:
        if time.time() > asked.until:
            return
        try:
            _pictures(ready._replace(prompts=ready.prompts[:1]), asked, options, each, {}, 1)
        except Exception:  # told when its turn comes
            torch.cuda.synchronize()


def _pictures(
    ready: Ready, asked: Asked, options: argparse.Namespace, listed: Listed,
    references: References, seeds: int | None = None,
) -> list[Picture]:  # fmt: skip
    method = ready.method(listed)
    if method is None:
        return []
    found = compare(
        ready.loaded.pipe,
        [method],
        ready.prompts,
        seeds=range(options.seeds if seeds is None else seeds),
        call=ready.call,
        steps=options.steps,
        batch=asked.batch,
        rounds=0,
        references=references,
        measures={"flip": ""} if options.flip else None,
    )
    return list(found.pictures)
