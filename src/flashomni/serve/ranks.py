"""A replica of several processes: rank 0 is the replica, the others are actors beside it.

All of them generate every picture together (``accelerate(..., ulysses=n)``), so all get the same
orders and stop behind the same step. What one of them raises by itself leaves the others waiting in
a collective: then the replica ends, they with it, and Serve starts another group.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import ray
import torch
import torch.distributed as dist
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from flashomni.serve.orders import Order
from flashomni.serve.settings import Settings
from flashomni.serve.worker import Made, Stopped, Worker

T = TypeVar("T")
TIMEOUT = timedelta(minutes=10)  # of a collective that somebody does not come to
GRACE = 60  # seconds that a rank may be behind rank 0
NEVER = threading.Event()


def join(settings: Settings, rank: int, address: str) -> Callable[[bool], bool]:
    """Join the processes of a replica.

    Args:
        settings: of the server.
        rank: of this process.
        address: where rank 0 listens.

    Returns:
        What tells all ranks whether rank 0 wants to stop.
    """
    is_gpu = settings.device == "cuda"  # each process sees its own card alone
    dist.init_process_group(
        "nccl" if is_gpu else "gloo",
        init_method=address,
        rank=rank,
        world_size=settings.size,
        timeout=TIMEOUT,
        device_id=torch.device("cuda", 0) if is_gpu else None,
    )
    host = dist.new_group(backend="gloo", timeout=TIMEOUT)

    def agree(stop: bool) -> bool:
        flag = torch.tensor([stop])
        dist.broadcast(flag, 0, group=host)
        return bool(flag)

    return agree


class Rank:
    """Another process of a replica, as an actor of Ray."""

    def __init__(self, settings: Settings, rank: int, address: str) -> None:
        if not settings.gpus_per_replica:
            torch.set_num_threads(max(1, int(settings.cpus)))
        self.worker = Worker(settings, agree=join(settings, rank, address))

    def warm_up(self) -> None:
        self.worker.warm_up()

    def generate(self, orders: list[Order]) -> None:
        """The same as rank 0; its pixels are those."""
        # Raised on all ranks alike; rank 0 says it.
        with suppress(Stopped, ValueError, NotImplementedError):
            self.worker.generate(orders, NEVER)

    def ping(self) -> bool:
        return True


class Group:
    """All processes of a replica, seen from rank 0; used as its worker.

    Args:
        settings: of the server.
    """

    def __init__(self, settings: Settings) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"tcp://127.0.0.1:{free.getsockname()[1]}"  # STRICT_PACK: of one host
        bundles = ray.util.get_current_placement_group()
        self.peers = [
            ray.remote(Rank)
            .options(
                num_cpus=settings.cpus,
                num_gpus=min(settings.gpus_per_replica, 1),
                max_concurrency=2,  # it answers while it generates
                scheduling_strategy=PlacementGroupSchedulingStrategy(bundles, rank),
            )
            .remote(settings, rank, address)
            for rank in range(1, settings.size)
        ]
        self.worker = Worker(settings, agree=join(settings, 0, address))
        self.check, self.limit = self.worker.check, self.worker.limit

    def warm_up(self) -> None:
        self._together("warm_up", (), self.worker.warm_up)

    def generate(self, orders: list[Order], stop: threading.Event) -> list[Made]:
        """See :meth:`Worker.generate`."""
        return self._together("generate", (orders,), lambda: self.worker.generate(orders, stop))

    def _together(self, name: str, args: tuple[Any, ...], own: Callable[[], T]) -> T:
        calls = [getattr(peer, name).remote(*args) for peer in self.peers]
        try:
            return own()
        finally:
            # Where it raised by itself, they wait for it: the replica goes, and they with it.
            ray.get(calls, timeout=GRACE)

    def is_whole(self) -> bool:
        """Whether all of them live."""
        try:
            return all(ray.get([peer.ping.remote() for peer in self.peers], timeout=30))
        except ray.exceptions.RayActorError:
            return False
