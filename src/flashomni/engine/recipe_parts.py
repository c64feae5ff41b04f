"""The flat sections of a recipe: what is carried forward and how, how it is kept, guidance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flashomni.engine.forecasts import (
    Fitted,
    Known,
    difference_weights,
    forecasts,
    looks_ahead,
)
from flashomni.engine.noise import Noise
from flashomni.engine.sparse_settings import SparseSettings, check_choice
from flashomni.engine.state.storage import DTYPES
from flashomni.policies import check_int, check_range

HISTORY_DTYPES = ("compute", *DTYPES)
HISTORY_DEVICES = ("compute", "host")
LEVELS = ("auto", "layers", "output")


@dataclass(frozen=True, kw_only=True)
class ForecastSettings:
    """How cached values are carried forward.

    Args:
        name: a forecast: ``chebyshev``, ``fitted``, ``foca``, ``hermite``, ``quadrature``,
            ``reuse``, ``taylor``, or what an extension registers.
        order: of cached tiles, 0 to 3: the forecast uses one anchor more.
        layer_order: of layers that are cached whole, and of the output, 0 to 3.
        level: ``layers`` caches tiles and layers; ``output`` what the whole model returned, and
            needs policy ``cached``; ``auto`` the output where every layer is cached whole anyway
            (see :attr:`Recipe.at_output`): far less memory, the same fidelity.
        fitted: the weights of forecast ``fitted``, which a calibration finds.
    """

    name: str = "taylor"
    order: int = 1
    layer_order: int = 0
    level: str = "auto"
    fitted: Fitted | None = None

    def __post_init__(self) -> None:
        check_choice("forecast", self.name, tuple(forecasts()))
        check_int("order", self.order, 0, 3)
        check_int("layer_order", self.layer_order, 0, 3)
        check_choice("level", self.level, LEVELS)
        if isinstance(self.fitted, Mapping):
            object.__setattr__(self, "fitted", Fitted(**self.fitted))
        if self.fitted is not None and not isinstance(self.fitted, Fitted):
            raise ValueError(f"fitted must be an object or null, got {self.fitted!r}")
        if (self.name == "fitted") != (self.fitted is not None):
            raise ValueError(
                "forecast 'fitted' and its weights come together: got forecast "
                f"{self.name!r} and fitted={self.fitted!r}"
            )

    @property
    def looks_ahead(self) -> bool:
        """Whether weights depend on the steps that will be computed, and on their noise."""
        names = [self.name, *(() if self.fitted is None else (self.fitted.base,))]
        return any(map(looks_ahead, names))

    def coefficients(
        self,
        times: tuple[int, ...],
        step: int,
        num_steps: int,
        computed: tuple[int, ...] = (),
        noise: Noise | None = None,
    ) -> tuple[float, ...]:
        """Weights of the terms of a history with these anchors, at a step of a generation.

        Args:
            times: the anchors.
            step: to forecast.
            num_steps: of the generation.
            computed: steps that are computed, where the schedule knows.
            noise: of the generation's steps, where the scheduler's are known.
        """
        known = Known(num_steps, self.fitted)
        if noise is not None and self.looks_ahead:
            known = Known(num_steps, self.fitted, self.layer_order, computed, noise.levels())
        return difference_weights(self.name, times, step, known)


@dataclass(frozen=True, kw_only=True)
class StorageSettings:
    """How histories and bias terms are kept.

    Args:
        history_dtype: ``compute``, ``bfloat16``, ``float16`` (which ends at 65,504), or ``float8``
            (a scale for each token; it halves the memory and costs precision).
        history_device: ``compute`` keeps those of tiles beside the model, ``host`` in pinned host
            memory: a layer's are on the device while it and the layer before it run.
    """

    history_dtype: str = "compute"
    history_device: str = "compute"

    def __post_init__(self) -> None:
        check_choice("history_dtype", self.history_dtype, HISTORY_DTYPES)
        check_choice("history_device", self.history_device, HISTORY_DEVICES)


@dataclass(frozen=True, kw_only=True)
class GuidanceSettings:
    """What is done with the further calls of a step: the unconditional branch of true CFG.

    For pipelines that call the transformer once for each branch, the conditional one first. The
    others are left out whole where a rule says so: their output is the first one's less a
    difference (FasterCache, arXiv 2410.19355; Adaptive Guidance, 2312.12487).

    Args:
        delta_every: of the steps that compute, the other branches are computed in every N-th; in
            between they have the difference of the last such step. 1 computes all.
        delta_after: share of the generation from which that holds.
        stop_after: share from which guidance stops: the others' output is the first one's.
    """

    delta_every: int = 1
    delta_after: float = 0.0
    stop_after: float = 1.0

    def __post_init__(self) -> None:
        check_int("delta_every", self.delta_every, 1, 1000)
        check_range("delta_after", self.delta_after, 0.0, 1.0)
        check_range("stop_after", self.stop_after, 0.0, 1.0)

    @property
    def acts(self) -> bool:
        """Whether it leaves anything out."""
        return self.delta_every > 1 or self.stop_after < 1.0


SECTIONS: dict[str, type] = {
    "forecast": ForecastSettings,
    "storage": StorageSettings,
    "sparse": SparseSettings,
    "guidance": GuidanceSettings,
}
