"""What a replica does next: one batch at a time, in a thread, of orders that may go together."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(eq=False)
class _Waiting(Generic[Item, Result]):
    item: Item
    done: asyncio.Future[Result] = field(init=False)

    def __post_init__(self) -> None:
        self.done = asyncio.get_running_loop().create_future()


class Batcher(Generic[Item, Result]):
    """Hands items to ``run`` in the order in which they came, those of one key together.

    It waits for nothing: what has come while a batch ran is there for the next one. The first in
    line decides the key, so nobody is overtaken for ever.

    Args:
        run: makes the results of a batch, in its order, in one thread of ours. Its second argument
            is set when nobody waits for any of them any more.
        key: of an item; only equal ones go together.
        limit: the most items of one batch, by the first of them.
    """

    def __init__(
        self,
        run: Callable[[list[Item], threading.Event], list[Result]],
        key: Callable[[Item], Hashable],
        limit: Callable[[Item], int] = lambda item: 1,
    ) -> None:
        self._run, self._key, self._limit = run, key, limit
        self._queue: list[_Waiting[Item, Result]] = []
        self._worker: asyncio.Task[None] | None = None
        # One thread for all batches: what belongs to a thread (a CUDA context, say) is made once.
        self._thread = ThreadPoolExecutor(1, "generate")

    async def submit(self, item: Item) -> Result:
        """The result of an item. Cancelled, it leaves the queue, or its batch once all have."""
        waiting = _Waiting[Item, Result](item)
        self._queue.append(waiting)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        try:
            return await waiting.done
        finally:
            if waiting in self._queue:
                self._queue.remove(waiting)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._queue:
            batch = self._take()
            stop = threading.Event()

            def look(_: object, batch: list = batch, stop: threading.Event = stop) -> None:
                if all(each.done.cancelled() for each in batch):
                    stop.set()

            for each in batch:
                each.done.add_done_callback(look)
            items = [each.item for each in batch]
            try:
                results = await loop.run_in_executor(self._thread, self._run, items, stop)
            except Exception as error:  # theirs to hear of; the next batch is another matter
                for each in batch:
                    if not each.done.done():
                        each.done.set_exception(error)
                continue
            for each, result in zip(batch, results, strict=True):
                if not each.done.done():
                    each.done.set_result(result)

    def _take(self) -> list[_Waiting[Item, Result]]:
        first = self._queue[0].item
        key, most = self._key(first), max(self._limit(first), 1)
        batch = [each for each in self._queue if self._key(each.item) == key][:most]
        self._queue = [each for each in self._queue if each not in batch]
        return batch
