"""The deployments of Ray Serve: a front that reads requests, and replicas that generate."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from starlette.requests import Request
from starlette.responses import Response

from flashomni.lab.media import encode
from flashomni.serve.batching import Batcher
from flashomni.serve.desk import Desk, File
from flashomni.serve.errors import SERVER, Failure, overloaded
from flashomni.serve.orders import Order, within_limit
from flashomni.serve.settings import Settings

log = logging.getLogger("flashomni")
FATAL = ("CUDA error", "device-side assert", "NCCL")  # behind which a process computes nothing more


@serve.deployment
class Generator:
    """A replica: one pipeline, on its card or cards."""

    def __init__(self, settings: Settings) -> None:
        import torch

        from flashomni.serve.metrics import Metrics
        from flashomni.serve.worker import Made, Worker

        if not settings.gpus_per_replica:
            torch.set_num_threads(max(1, int(settings.cpus)))
        self.settings = settings
        self.group: Any = None
        if settings.size > 1:
            from flashomni.serve.ranks import Group

            self.group = Group(settings)
        self.worker = self.group or Worker(settings)
        self.worker.warm_up()
        self.metrics = Metrics(settings.model)
        self.batcher: Batcher[Order, Made] = Batcher(
            self.worker.generate, lambda order: order.key, self.worker.limit
        )

    async def __call__(self, order: Order) -> File | Failure:
        """Make an order. What goes wrong is a value: exceptions lose their class on the way."""
        try:
            self.worker.check(order)
            made = await self.batcher.submit(order)
        except asyncio.CancelledError:
            self.metrics.cancelled.inc()
            raise
        except Exception as error:
            failure = Failure.of(error)
            if failure.status >= 500:
                log.exception("no picture")
                if self.group or any(word in str(error) for word in FATAL):
                    _leave()
            self.metrics.failed(failure.status)
            return failure
        self.metrics.made(order, made)
        data = await asyncio.to_thread(_file, made.pixels, order.format, self.settings.fps)
        about = {
            "seconds": round(made.seconds, 4),
            "recipe": made.recipe,
            "flops_skipped": made.flops_skipped,
            "cache_bytes": made.cache_bytes,
            "batch": made.batch,
            "replica": os.getpid(),
        }
        return File(data, {**about, "fault": made.fault} if made.fault else about)

    async def check_health(self) -> None:
        """Asked by Serve."""
        if self.group and not await asyncio.to_thread(self.group.is_whole):
            log.error("a rank is gone")
            _leave()


@serve.deployment
class Front:
    """Reads requests, gives orders to replicas, and to another one where a replica died."""

    def __init__(self, settings: Settings, generator: Any) -> None:
        self.settings, self.generator = settings, generator
        self.desk = Desk(settings, self.send, self.ready)

    async def __call__(self, request: Request) -> Response:
        accept, kind = (request.headers.get(name, "") for name in ("accept", "content-type"))
        path, body = request.url.path, await within_limit(request.stream())
        reply = await self.desk.answer(request.method, path, body, accept, kind)
        return Response(reply.body, reply.status, reply.headers, reply.type)

    async def send(self, order: Order) -> File | Failure:
        """What a replica makes of an order: it has a seed, so it may be made again."""
        for tries_left in range(self.settings.retries, -1, -1):
            response = self.generator.remote(order)
            try:
                return await response
            except asyncio.CancelledError:
                response.cancel()
                raise
            except BackPressureError:
                return overloaded(self.desk.in_flight, self.desk.retry_after)
            except RayActorError as error:
                log.warning("a replica died; %d tries left: %s", tries_left, error)
        message = f"{self.settings.retries + 1} replicas died with this request"
        return Failure(500, message, kind=SERVER, code="replica_died")

    async def ready(self) -> int:
        """How many replicas run, as the controller knows it: it learns of a death in seconds."""
        status = await asyncio.to_thread(serve.status)
        for application in status.applications.values():
            found = application.deployments.get(GENERATOR)
            if found is not None:
                return sum(n for s, n in found.replica_states.items() if str(s) == "RUNNING")
        return 0


GENERATOR = "Generator"


def _leave() -> None:
    """End a replica that can compute nothing more: others make what it held, Serve replaces it.

    It would only be asked the more, the faster it fails.
    """
    logging.shutdown()
    os._exit(1)


def _file(pixels: Any, kind: str, fps: int) -> bytes:
    from PIL import Image

    return encode([Image.fromarray(frame) for frame in pixels.numpy()], kind, fps)


def build(settings: Settings) -> serve.Application:
    """The application of some settings."""
    gpus, cpus = settings.gpus_per_replica, settings.cpus
    options: dict[str, Any] = {
        "num_replicas": settings.replicas,
        "max_ongoing_requests": max(settings.in_flight, settings.max_batch),
        "max_queued_requests": settings.queue,
        "health_check_timeout_s": 60,
        "graceful_shutdown_timeout_s": 60,
        "ray_actor_options": {"num_cpus": cpus, "num_gpus": min(gpus, 1)},
    }
    if settings.size > 1:
        bundle = {"CPU": cpus, **({"GPU": 1} if gpus else {})}
        options["placement_group_bundles"] = [bundle] * settings.size
        options["placement_group_strategy"] = "STRICT_PACK"
    generator = Generator.options(**options).bind(settings)  # type: ignore[attr-defined]
    front = Front.options(  # type: ignore[attr-defined]
        num_replicas=1,
        # Its own bound is never met: it holds what waits for replicas, and what they refuse.
        max_ongoing_requests=10 * (settings.queue + settings.replicas * 64),
        ray_actor_options={"num_cpus": 0},
    )
    return front.bind(settings, generator)
