"""Other people's accelerations, as they ship: diffusers' own caches, and cache-dit.

A peer is a class with its settings; they go to the peer's own configuration, which knows what is
allowed. Nothing here tunes or repairs a peer.
"""

from __future__ import annotations

import copy
import importlib
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, ClassVar

from flashomni.registry import Registry, decorator
from flashomni.util.settings import parse_settings


class Peer:
    """An acceleration that is not ours.

    Args:
        settings: of the peer's configuration.

    Raises:
        NotImplementedError: the library that has it is not installed, or is too old.

    Attributes:
        modules: what it imports; a result is kept for their versions.
        looks: whether it decides by what it sees, so that a picture of a batch is another one.
    """

    modules: ClassVar[tuple[str, ...]] = ()
    looks: bool = False

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = dict(settings)

    def prepare(self, pipe: Any, num_steps: int, run: Callable[[], None]) -> None:
        """Learn what the peer needs to know of the model; ``run()`` is one generation."""

    @contextmanager
    def attached(self, pipe: Any, num_steps: int) -> Iterator[None]:
        """Put it on the pipeline for one generation, and take it off whatever happens.

        Raises:
            ValueError: a setting that the peer does not take.
        """
        raise TypeError(f"{type(self).__name__} does not implement attached")
        yield


PEERS: Registry[type[Peer]] = Registry("peer", __name__, "flashomni.peers")


def peer(name: str) -> Callable[[type[Peer]], type[Peer]]:
    """Register a class under the name that users write."""
    return decorator(PEERS, name)


def make_peer(text: str) -> Peer:
    """A peer by name, with settings: ``diffusers.first_block:threshold=.1``.

    Raises:
        ValueError: no such peer.
        NotImplementedError: it cannot run here.
    """
    name, settings = parse_settings(text)
    return PEERS.get(name)(settings)


class _DiffusersCache(Peer):
    """A configuration class of diffusers, given to ``enable_cache``."""

    config: str
    modules = ("diffusers",)

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        import diffusers

        self._build = getattr(diffusers, self.config, None)
        if self._build is None:
            raise NotImplementedError(f"diffusers {diffusers.__version__} has no {self.config}")

    def extra(self, pipe: Any, num_steps: int) -> dict[str, Any]:
        """Settings that follow from the pipeline."""
        return {}

    @contextmanager
    def attached(self, pipe: Any, num_steps: int) -> Iterator[None]:
        with self._enabled(pipe, {**self.extra(pipe, num_steps), **self.settings}):
            yield

    @contextmanager
    def _enabled(self, pipe: Any, settings: dict[str, Any]) -> Iterator[None]:
        assert self._build is not None
        try:
            config = self._build(**settings)
        except TypeError as error:
            raise ValueError(f"{self.config}: {error}") from error
        with _copied(pipe):
            pipe.transformer.enable_cache(config)
            yield


@peer("diffusers.taylorseer")
class TaylorSeer(_DiffusersCache):
    """TaylorSeer (arXiv 2503.06923); ``cache_interval``, ``max_order``, ...

    Factors are kept in the model's dtype: diffusers' default, bfloat16, would add a rounding that
    nobody chooses who runs in fp32.
    """

    config = "TaylorSeerCacheConfig"

    def extra(self, pipe: Any, num_steps: int) -> dict[str, Any]:
        return {"taylor_factors_dtype": pipe.transformer.dtype}


@peer("diffusers.first_block")
class FirstBlock(_DiffusersCache):
    """Recompute when the first block's residual has moved by ``threshold``."""

    config = "FirstBlockCacheConfig"
    looks = True


@peer("diffusers.pab")
class PyramidAttentionBroadcast(_DiffusersCache):
    """Reuse attention outputs (arXiv 2408.12588); ``spatial_attention_block_skip_range``, ..."""

    config = "PyramidAttentionBroadcastConfig"

    def extra(self, pipe: Any, num_steps: int) -> dict[str, Any]:
        return {
            "spatial_attention_block_skip_range": 2,
            "current_timestep_callback": lambda: pipe.current_timestep,
        }


@peer("diffusers.mag")
class Mag(_DiffusersCache):
    """MagCache (arXiv 2506.09045); ``threshold``, ``max_skip_steps``, ``retention_ratio``.

    Its magnitude ratios are measured on the model by its own calibration run. With ``steps``, a
    list of steps to compute, it leaves out all others: what its rule makes of a schedule that
    somebody has found for it.
    """

    config = "MagCacheConfig"
    _ratios: list[float] | None = None

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self._steps = _steps(self.settings)

    def prepare(self, pipe: Any, num_steps: int, run: Callable[[], None]) -> None:
        if self._steps is not None:
            return
        printed = io.StringIO()  # the calibration hands its result over in print
        settings = {"calibrate": True, "num_inference_steps": num_steps}
        with redirect_stdout(printed), self._enabled(pipe, settings):
            run()
        lists = [line for line in printed.getvalue().splitlines() if line.startswith("[")]
        lists = [line for line in lists if not line.startswith("[MagCache]")]
        if not lists:
            raise RuntimeError("diffusers' MagCache calibration printed no ratios")
        self._ratios = json.loads(lists[-1])

    def extra(self, pipe: Any, num_steps: int) -> dict[str, Any]:
        if self._steps is not None:
            # A ratio of 1 adds nothing to the error that its rule sums up, a large one ends a gap.
            computed = _mask(self._steps, num_steps)
            settings = {"threshold": 0.5, "max_skip_steps": num_steps, "retention_ratio": 0.0}
            ratios = [1e6 if live else 1.0 for live in computed]
            return {**settings, "num_inference_steps": num_steps, "mag_ratios": ratios}
        if self._ratios is None:
            raise RuntimeError("MagCache must be prepared before it is attached")
        return {"num_inference_steps": num_steps, "mag_ratios": self._ratios}


MASKED = {"steps_computation_policy": "static"}  # of cache-dit: the mask alone decides


@peer("cache-dit")
class CacheDiT(Peer):
    """DBCache of cache-dit; fields of ``DBCacheConfig``, and ``taylorseer_order`` for its forecast.

    ``Fn_compute_blocks``, ``residual_diff_threshold``, ``max_warmup_steps``, ... ``mask``, one of
    its masks of steps (``slow``, ``medium``, ``fast``, ``ultra``), or ``steps``, a list of steps to
    compute, take the place of its threshold.
    """

    modules = ("cache_dit",)

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self._steps = _steps(self.settings)
        self._policy = self.settings.pop("mask", None)
        if self._steps is not None and self._policy is not None:
            raise ValueError("steps and mask of cache-dit say the same: give one of them")
        self.looks = self._steps is None and self._policy is None
        try:
            self._library = importlib.import_module("cache_dit")
        except ImportError as error:
            raise NotImplementedError(f"cache-dit cannot be imported: {error}") from error

    def _masked(self, num_steps: int) -> dict[str, Any]:
        """The settings of a mask of steps, if there is one."""
        if self._steps is not None:
            mask = [int(live) for live in _mask(self._steps, num_steps)]
            warm = mask.index(0) if 0 in mask else num_steps  # what is not its own comes on top
            return {**MASKED, "steps_computation_mask": mask, "max_warmup_steps": warm}
        elif self._policy is not None:
            mask = self._library.steps_mask(mask_policy=self._policy, total_steps=num_steps)
        else:
            return {}
        return {**MASKED, "steps_computation_mask": mask}

    @contextmanager
    def attached(self, pipe: Any, num_steps: int) -> Iterator[None]:
        library, settings = self._library, {**self._masked(num_steps), **self.settings}
        order = settings.pop("taylorseer_order", None)
        calibrator = None
        if order is not None:
            calibrator = library.TaylorSeerCalibratorConfig(taylorseer_order=order)
        try:
            config = library.DBCacheConfig(num_inference_steps=num_steps, **settings)
        except TypeError as error:
            raise ValueError(f"DBCacheConfig: {error}") from error
        with _copied(pipe):
            library.enable_cache(pipe, cache_config=config, calibrator_config=calibrator)
            try:
                yield
            finally:
                library.disable_cache(pipe)


@contextmanager
def _copied(pipe: Any) -> Iterator[None]:
    """Put a copy of the transformer that shares its weights in its place.

    What peers put on a model they do not take off whole: cache-dit patches it for good, diffusers
    leaves stand-ins for the ``forward`` of blocks, behind which no CUDA graph is recorded.
    """
    stock = pipe.transformer
    shared = {id(x): x for x in (*stock.parameters(), *stock.buffers())}
    pipe.transformer = copy.deepcopy(stock, shared)
    try:
        yield
    finally:
        pipe.transformer = stock


def _steps(settings: dict[str, Any]) -> list[int] | None:
    """Take the steps to compute out of a peer's settings.

    Raises:
        ValueError: they are no list of ascending step numbers from 0 on.
    """
    steps = settings.pop("steps", None)
    if steps is None:
        return None
    numbers = isinstance(steps, list) and all(type(step) is int for step in steps)
    if not numbers or steps[:1] != [0] or steps != sorted(set(steps)):
        raise ValueError(f"steps must be ascending step numbers from 0 on, got {steps!r}")
    return steps


def _mask(steps: list[int], num_steps: int) -> list[bool]:
    """Whether each step is computed.

    Raises:
        ValueError: the list names a step that there is not.
    """
    if steps[-1] >= num_steps:
        raise ValueError(f"steps must be below the {num_steps} steps of the run, got {steps}")
    return [step in steps for step in range(num_steps)]
