"""The routes of the server, without a server: what is asked, what is answered."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from flashomni.lab.media import TYPES
from flashomni.serve.errors import Failed, Failure, Refused
from flashomni.serve.orders import Order, read_body, read_images, read_video
from flashomni.serve.settings import Settings
from flashomni.serve.videos import Jobs

OWNER = "flashomni"


@dataclass(frozen=True)
class Reply:
    """What goes back over HTTP."""

    status: int
    body: bytes
    type: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def json(cls, data: Any, status: int = 200, **headers: str) -> Reply:
        return cls(status, json.dumps(data).encode(), headers=headers)

    @classmethod
    def failed(cls, failure: Failure) -> Reply:
        wait = failure.retry_after
        headers = {} if wait is None else {"Retry-After": str(wait)}
        return cls.json(failure.to_dict(), failure.status, **headers)


@dataclass(frozen=True)
class File:
    """What a replica made: a file, and what it cost.

    Args:
        data: of the file.
        about: JSON values: seconds, FLOPs skipped, recipe, replica, ...
    """

    data: bytes
    about: dict[str, Any]


Send = Callable[[Order], Awaitable[File | Failure]]


class Desk:
    """Answers requests; ``send`` has a replica make an order.

    Args:
        settings: of the server.
        send: gives a file, or why there is none. Cancelled, the replica stops.
        ready: how many replicas serve.
    """

    def __init__(self, settings: Settings, send: Send, ready: Callable[[], Awaitable[int]]) -> None:
        self.settings, self._send, self._ready = settings, send, ready
        self.created = int(time.time())
        self.in_flight = self.answered = 0
        self._seconds = 1.0  # of a picture, lately
        self.jobs = Jobs(self._make, settings, lambda: self.retry_after)

    @property
    def retry_after(self) -> int:
        """Seconds until what waits now is done, about."""
        wait = self._seconds * self.in_flight / self.settings.replicas
        return min(max(math.ceil(wait), 1), 600)

    async def answer(
        self, method: str, path: str, body: bytes, accept: str = "", kind: str = ""
    ) -> Reply:
        """The reply to a request. Cancelled, nothing more is computed for it.

        Args:
            method: of HTTP.
            path: without its query.
            body: JSON, or a form.
            accept: the header; ``image/...`` asks for the picture itself.
            kind: the header ``content-type``.
        """
        path = path.rstrip("/")
        try:
            if f"{path}/".startswith("/v1/videos/"):
                return await self._videos(method, path.removeprefix("/v1/videos"), body, kind)
            route = {
                ("POST", "/v1/images/generations"): lambda: self._images(body, accept, kind),
                ("GET", "/v1/models"): self._models,
                ("GET", f"/v1/models/{self.settings.model}"): self._model,
                ("GET", "/health"): self._health,
            }.get((method, path))
            if route is None:
                raise Refused(f"there is no {method} {path or '/'} here", status=404)
            return await route()
        except Exception as error:
            return Reply.failed(Failure.of(error))

    async def _make(self, order: Order) -> File:
        """Raises :class:`Failed`."""
        self.in_flight += 1
        try:
            made = await self._send(order)
        finally:
            self.in_flight -= 1
        if isinstance(made, Failure):
            raise Failed(made)
        self.answered += 1
        self._seconds += (made.about.get("seconds", self._seconds) - self._seconds) / 8
        return made

    async def _images(self, body: bytes, accept: str, kind: str) -> Reply:
        orders = read_images(read_body(body, kind), self.settings)
        tasks = [asyncio.create_task(self._make(order)) for order in orders]
        try:
            files = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        about = [
            {"seed": order.seed, **file.about} for order, file in zip(orders, files, strict=True)
        ]
        if accept.partition(";")[0].strip().startswith("image/") and len(files) == 1:
            headers = {
                # Of ASCII alone: what an engine failed with may say anything.
                f"x-flashomni-{k.replace('_', '-')}": str(v).encode("ascii", "replace").decode()
                for k, v in about[0].items()
            }
            return Reply(200, files[0].data, TYPES[orders[0].format], headers)
        data = [{"b64_json": base64.b64encode(file.data).decode()} for file in files]
        form = {"output_format": orders[0].format}
        return Reply.json({"created": int(time.time()), "data": data, **form, OWNER: about})

    async def _videos(self, method: str, rest: str, body: bytes, kind: str) -> Reply:
        name, _, part = rest.strip("/").partition("/")
        if (method, name) == ("POST", ""):
            order = read_video(read_body(body, kind), self.settings)
            return Reply.json(self.jobs.start(order))
        if (method, name) == ("GET", ""):
            return Reply.json({"object": "list", "data": self.jobs.all()})
        if (method, part) == ("GET", ""):
            return Reply.json(self.jobs.about(name))
        if (method, part) == ("DELETE", ""):
            return Reply.json(self.jobs.delete(name))
        if (method, part) == ("GET", "content"):
            return Reply(200, self.jobs.file(name), TYPES["webp"])
        raise Refused(f"there is no {method} /v1/videos{rest} here", status=404)

    def _card(self) -> dict[str, Any]:
        settings = self.settings
        known = {"recipes": settings.allowed, "loras": tuple(settings.loras)}
        card = {"id": settings.model, "object": "model", "created": self.created, "owned_by": OWNER}
        return {**card, **known}

    async def _models(self) -> Reply:
        return Reply.json({"object": "list", "data": [self._card()]})

    async def _model(self) -> Reply:
        return Reply.json(self._card())

    async def _health(self) -> Reply:
        ready = await self._ready()
        word = "ok" if ready else "no replica is up"
        counts = {"replicas": ready, "in_flight": self.in_flight, "answered": self.answered}
        return Reply.json({"status": word, **counts}, 200 if ready else 503)
