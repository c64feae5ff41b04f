"""Which requests go together in one call of a replica, and that nobody waits for ever."""

import asyncio
import threading

import pytest
from serve_parts import run

from flashomni.engine import Recipe
from flashomni.serve.batching import Batcher
from flashomni.serve.exactness import KEPT, Proof, decides_together
from flashomni.serve.worker import Stopped


class Runs:
    """A `run` of a Batcher that waits until it may go on, and remembers what it was given."""

    def __init__(self):
        self.batches, self.stopped = [], []
        self.started, self.go = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, items, stop):
        self.batches.append(items)
        self.started.release()
        while not self.go.acquire(timeout=0.01):
            if stop.is_set():
                self.stopped.append(items)
                raise Stopped
        return [item.upper() for item in items]

    async def wait(self):
        await asyncio.to_thread(self.started.acquire)


def first_letter(item):
    return item[0]


def test_what_waits_goes_together_in_the_order_of_its_first():
    """Equal keys only, at most as many as the limit, and nobody is overtaken for ever."""

    async def main():
        runs = Runs()
        batcher = Batcher(runs, first_letter, lambda item: 2)
        first = asyncio.create_task(batcher.submit("a1"))
        await runs.wait()
        later = [asyncio.create_task(batcher.submit(x)) for x in ("b1", "a2", "b2", "b3", "a3")]
        await asyncio.sleep(0)
        runs.go.release(9)
        return runs.batches, await asyncio.gather(first, *later)

    batches, results = run(main())
    assert batches == [["a1"], ["b1", "b2"], ["a2", "a3"], ["b3"]]
    assert results == ["A1", "B1", "A2", "B2", "B3", "A3"]


def test_who_goes_is_taken_out():
    """Of the queue at once; a batch is stopped when all of it have gone, not before."""

    async def main():
        runs = Runs()
        batcher = Batcher(runs, first_letter, lambda item: 2)
        alone = asyncio.create_task(batcher.submit("a"))
        await runs.wait()
        two = [asyncio.create_task(batcher.submit(x)) for x in ("b1", "b2")]
        gone = asyncio.create_task(batcher.submit("c"))
        await asyncio.sleep(0)
        gone.cancel()
        alone.cancel()
        await runs.wait()
        two[0].cancel()
        await asyncio.sleep(0)
        runs.go.release()
        return runs, await asyncio.gather(two[1])

    runs, results = run(main())
    assert runs.batches == [["a"], ["b1", "b2"]] and runs.stopped == [["a"]]
    assert results == ["B2"]


def test_a_batch_that_fails_is_its_own():
    """Who waits for it hears of it; the next one runs."""

    async def main():
        def fails(items, stop):
            if items == ["bad"]:
                raise ValueError("size must be ...")
            return items

        batcher = Batcher(fails, first_letter)
        tasks = [batcher.submit(x) for x in ("bad", "good")]
        return await asyncio.gather(*tasks, return_exceptions=True)

    wrong, right = run(main())
    assert isinstance(wrong, ValueError) and right == "good"


@pytest.mark.parametrize(
    ("recipe", "together"),
    [("fora", False), ("taylorseer", False), ("lossless", False), ("topk", False),
     ("balanced", False), ("flashomni", True), ("easycache", True), ("fora:delta_every=2", True)],
)  # fmt: skip
def test_recipes_that_decide_for_a_whole_batch(recipe, together):
    """By a mean over it: then a picture would depend on what somebody else asked for."""
    assert decides_together(Recipe.of(recipe), 28) is together


def test_a_size_that_differed_is_not_tried_again():
    """The next smaller one may be."""
    proof = Proof()
    assert proof.limit("key", 4) == 4 and proof.known("key", 4) is None
    proof.saw("key", 4, False)
    proof.saw("key", 3, True)
    assert proof.limit("key", 4) == 3 and proof.limit("other", 4) == 4
    proof.saw("key", 3, False)
    proof.saw("key", 2, False)
    assert proof.limit("key", 4) == 1
    for number in range(KEPT):
        proof.saw(number, 2, True)
    assert len(proof._same) == KEPT and proof.known("key", 4) is None
