"""Videos in OpenAI's form: a job that is asked for, looked at, fetched and deleted."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from flashomni.serve.errors import Failed, Failure, Refused, overloaded
from flashomni.serve.orders import Order
from flashomni.serve.settings import Settings

KEPT = 64  # finished ones; the oldest go first


@dataclass(eq=False)
class Job:
    """A video that is made, was made, or failed."""

    id: str
    order: Order
    created: int
    status: str = "queued"
    completed: int | None = None
    data: bytes = b""
    failure: Failure | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    task: asyncio.Task[None] | None = None

    @property
    def ended(self) -> bool:
        return self.status in ("completed", "failed")


class Jobs:
    """The jobs of a front, in its memory: they are gone when it is.

    Args:
        make: has a replica make an order; its exceptions are the job's.
        settings: of the server.
        retry_after: seconds until there is room, about.
    """

    def __init__(
        self,
        make: Callable[[Order], Awaitable[Any]],
        settings: Settings,
        retry_after: Callable[[], int],
    ) -> None:
        self._make, self._settings, self._retry_after = make, settings, retry_after
        self._jobs: dict[str, Job] = {}

    def start(self, order: Order) -> dict[str, Any]:
        """Begin a job.

        Raises:
            Failed: as many wait as may.
        """
        waiting = sum(not job.ended for job in self._jobs.values())
        if waiting > self._settings.queue:
            raise Failed(overloaded(waiting, self._retry_after()))
        job = Job(f"video_{secrets.token_hex(12)}", order, int(time.time()))
        ended = [each.id for each in self._jobs.values() if each.ended]
        for old in ended[: max(len(ended) - KEPT + 1, 0)]:
            del self._jobs[old]
        self._jobs[job.id] = job
        job.task = asyncio.create_task(self._run(job))
        return self._card(job)

    async def _run(self, job: Job) -> None:
        try:
            made = await self._made(job)
            job.data, job.facts, job.status = made.data, made.about, "completed"
        except asyncio.CancelledError:
            raise
        except Exception as error:
            job.failure = Failure.of(error)
            job.status = "failed"
        job.completed = int(time.time())

    async def _made(self, job: Job) -> Any:
        """What replicas make of a job: it was accepted, so it waits where they take no more."""
        while True:
            job.status = "in_progress"
            try:
                return await self._make(job.order)
            except Failed as failed:
                wait = failed.failure.retry_after
                if wait is None:
                    raise
            job.status = "queued"
            await asyncio.sleep(wait)

    def all(self) -> list[dict[str, Any]]:
        return [self._card(job) for job in reversed(self._jobs.values())]

    def about(self, name: str) -> dict[str, Any]:
        return self._card(self._find(name))

    def file(self, name: str) -> bytes:
        """The video.

        Raises:
            Refused: there is no such job, or it is not done.
        """
        job = self._find(name)
        if job.status != "completed":
            raise Refused(f"video {name} is {job.status}", status=409)
        return job.data

    def delete(self, name: str) -> dict[str, Any]:
        """Forget a job; one that is under way is stopped."""
        job = self._find(name)
        if job.task is not None:
            job.task.cancel()
        del self._jobs[name]
        return {"id": name, "object": "video.deleted", "deleted": True}

    def _find(self, name: str) -> Job:
        if name not in self._jobs:
            raise Refused(f"there is no video {name[:80]!r}", status=404)
        return self._jobs[name]

    def _card(self, job: Job) -> dict[str, Any]:
        order, frames = job.order, job.order.frames
        seconds = None if frames is None else f"{frames / self._settings.fps:g}"
        error = None if job.failure is None else job.failure.to_dict()["error"]
        return {
            "id": job.id,
            "object": "video",
            "model": self._settings.model,
            "status": job.status,
            "progress": 100 if job.status == "completed" else 0,
            "created_at": job.created,
            "completed_at": job.completed,
            "size": None if order.size is None else f"{order.size[0]}x{order.size[1]}",
            "seconds": seconds,
            "error": error,
            "flashomni": {"seed": order.seed, **job.facts},
        }
