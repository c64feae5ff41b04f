"""What a replica counts; Ray exports it to Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray.serve import metrics

from flashomni.serve.orders import Order

if TYPE_CHECKING:
    from flashomni.serve.worker import Made

BOUNDS = [0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500]


class Metrics:
    """Counters of one replica. In Prometheus their names begin with ``ray_``.

    Args:
        model: a tag of all of them.
    """

    def __init__(self, model: str) -> None:
        def counter(name: str, about: str, *tags: str) -> metrics.Counter:
            made = metrics.Counter(f"flashomni_{name}", about, ("model", *tags))
            made.set_default_tags({"model": model})
            return made

        self.pictures = counter("pictures", "pictures and videos made", "recipe")
        self.dense = counter("flops_dense", "FLOPs of the blocks without a recipe", "recipe")
        self.executed = counter("flops_executed", "FLOPs of the blocks executed", "recipe")
        self.faults = counter("engine_faults", "requests made dense: the engine failed", "recipe")
        self.cancelled = counter("cancelled", "requests whose client went")
        self.failures = counter("failures", "requests refused or failed", "status")
        self.seconds = metrics.Histogram(
            "flashomni_seconds", "of the pipeline's call", BOUNDS, ("model", "recipe")
        )
        self.seconds.set_default_tags({"model": model})
        self.batch = metrics.Histogram(
            "flashomni_batch", "orders made together", [1, 2, 4, 8, 16], ("model", "recipe")
        )
        self.batch.set_default_tags({"model": model})

    def made(self, order: Order, made: Made) -> None:
        """A picture or video."""
        tags = {"recipe": order.recipe}
        self.pictures.inc(tags=tags)
        if made.fault:
            self.faults.inc(tags=tags)
        for counter, flops in (
            (self.dense, made.flops_dense),
            (self.executed, made.flops_executed),
        ):
            if flops:
                counter.inc(flops, tags=tags)
        self.seconds.observe(made.seconds, tags=tags)
        self.batch.observe(made.batch, tags=tags)

    def failed(self, status: int) -> None:
        """A request without a picture."""
        self.failures.inc(tags={"status": str(status)})
