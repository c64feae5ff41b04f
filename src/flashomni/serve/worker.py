"""One pipeline that makes what is ordered: accelerated, dense where the engine fails, stopped."""

from __future__ import annotations

import inspect
import logging
import math
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashomni.engine import Engine, Recipe
from flashomni.lab import zoo
from flashomni.models import accelerate
from flashomni.serve.errors import Refused
from flashomni.serve.exactness import Proof, decides_together
from flashomni.serve.orders import Order
from flashomni.serve.settings import Settings
from flashomni.util.words import one_line

log = logging.getLogger("flashomni")
ADAPTER = "flashomni"  # how the one LoRA is called that is loaded
DENSE = "dense"
# Arguments of pipelines, and the field of a request that they come from.
FIELDS = {"width": "size", "height": "size", "num_frames": "seconds"}


# Of a transformer's configuration: what its pipeline makes unasked; sides in latents.
OWN = {
    "width": ("sample_width", "sample_size"),
    "height": ("sample_height", "sample_size"),
    "num_frames": ("sample_frames",),
}


class Stopped(Exception):
    """Nobody waits for it any more."""


class Apart(Exception):
    """The engine failed in a batch, whose pictures without it need not be those of each alone."""


@dataclass(frozen=True)
class Made:
    """A picture or video, and what it cost.

    Args:
        pixels: uint8 ``[F, H, W, 3]``.
        seconds: that the pipeline's call took, for all of its batch.
        recipe: under which it was made; ``dense`` where the engine failed.
        batch: orders that were made together.
        flops_dense: of the transformer's blocks without the recipe, its share of the batch.
        flops_executed: what was executed of them.
        cache_bytes: peak of what the engine kept, for all of the batch.
        fault: what the engine failed with.
    """

    pixels: Tensor
    seconds: float
    recipe: str
    batch: int = 1
    flops_dense: float = 0.0
    flops_executed: float = 0.0
    cache_bytes: int = 0
    fault: str = ""

    @property
    def flops_skipped(self) -> float:
        return 1 - self.flops_executed / self.flops_dense if self.flops_dense else 0.0


class Worker:
    """A pipeline and the engine that is on it.

    Args:
        settings: of the server.
        loaded: the pipeline; loaded by the settings if it is not given.
        agree: of ranks that generate together: whether rank 0 wants to stop.

    Raises:
        ValueError: the model, a recipe or a LoRA cannot be loaded.
        NotImplementedError: the model cannot be accelerated with an allowed recipe.
    """

    def __init__(
        self,
        settings: Settings,
        loaded: zoo.Loaded | None = None,
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        self.settings, self.proof, self._agree = settings, Proof(), agree
        if loaded is None:
            default = "bfloat16" if settings.gpus_per_replica else "float32"
            dtype = getattr(torch, settings.dtype or default)
            loaded = zoo.load(settings.model, settings.device, dtype)
        self.loaded, self.pipe = loaded, loaded.pipe
        self.pipe.set_progress_bar_config(disable=True)
        self._takes = inspect.signature(type(self.pipe).__call__).parameters
        self._recipes = {name: Recipe.of(name) for name in settings.allowed}
        self._engine: Engine | None = None
        self._recipe: str | None = None
        self._lora: tuple[str, float] | None = None
        if "callback_on_step_end" not in self._takes:
            log.warning("%s cannot be stopped between steps", type(self.pipe).__name__)

    @property
    def makes_videos(self) -> bool:
        return "num_frames" in self._takes

    def warm_up(self) -> None:
        """Try each LoRA and each recipe, and generate with the default one."""
        for lora in self.settings.loras:
            self._set_lora((lora, 1.0))
        for recipe in reversed(self.settings.allowed):
            self._set(recipe, None)
        if self.settings.warm_up:
            steps, frames = self.settings.warm_up, 5 if self.makes_videos else None
            order = Order("warm up", 0, self.settings.recipe, steps=steps, frames=frames)
            self._call([order], threading.Event())

    def check(self, order: Order) -> None:
        """Refuse what the pipeline cannot do, before anything is computed.

        Raises:
            Refused: a field is about something that this pipeline does not take or make.
        """
        name = type(self.pipe).__name__
        if order.video != self.makes_videos:
            route = "/v1/videos" if self.makes_videos else "/v1/images/generations"
            raise Refused(f"{name} is asked at {route}", status=404)
        for argument in order.call():
            if argument not in self._takes:
                field = FIELDS.get(argument, argument)
                raise Refused(f"{field} must be left out: {name} takes no {argument}", field)
        if order.negative is not None:
            self._check_negative(order)
        if order.size is not None:
            unit = 2 * self._scale()
            if any(side % unit for side in order.size):
                raise Refused(
                    f"size must be multiples of {unit}, got {order.size[0]}x{order.size[1]}", "size"
                )
        self._check_pixels(order)

    def _check_negative(self, order: Order) -> None:
        field, name = "negative_prompt", type(self.pipe).__name__
        if field not in self._takes:
            raise Refused(f"{field} must be left out: {name} takes none", field)
        if "true_cfg_scale" in self._takes:  # without it the pipeline ignores it
            default = self._takes["true_cfg_scale"].default
            scale = order.true_cfg or self.loaded.call.get("true_cfg_scale", default)
            if scale <= 1:
                raise Refused(f"{field} needs a true_cfg_scale of more than 1, got {scale}", field)

    def _check_pixels(self, order: Order) -> None:
        """Count what an order leaves out too: only the pipeline knows how much that is."""
        own = {name: self._own(name) for name in FIELDS if name in self._takes}
        asked = {name: value for name, value in order.call().items() if name in own}
        most = max(self.settings.max_pixels, math.prod(own.values()))
        pixels = math.prod({**own, **asked}.values())
        if asked and pixels > most:
            field = "size" if order.size is not None else FIELDS["num_frames"]
            raise Refused(f"{field} must give at most {most} pixels in all, got {pixels}", field)

    def _own(self, name: str) -> int:
        """Width, height or frames that the pipeline makes unasked; 1 where it does not say."""
        usual = self.loaded.call.get(name) or self._takes[name].default
        if not usual and name != "num_frames":
            usual = getattr(self.pipe, f"default_{name}", None)
            side = getattr(self.pipe, "default_sample_size", None)
            usual = usual or (side * self._scale() if isinstance(side, int) else None)
        return usual if isinstance(usual, int) else self._configured(name)

    def _configured(self, name: str) -> int:
        """The same of pipelines that ask their transformer (CogVideoX, PixArt, Allegro)."""
        config = getattr(getattr(self.pipe, "transformer", None), "config", None)
        found = (getattr(config, key, None) for key in OWN[name])
        value = next((each for each in found if isinstance(each, int)), None)
        if value is None:
            return 1
        if name != "num_frames":
            return value * self._scale()
        in_latents = type(self.pipe).__name__.startswith("Allegro")
        return value * (self.pipe.vae_scale_factor_temporal if in_latents else 1)

    def _scale(self) -> int:
        """Pixels of a side that the VAE makes one latent of."""
        for name in (
            "vae_scale_factor",
            "vae_scale_factor_spatial",
            "vae_spatial_compression_ratio",
        ):
            value = getattr(self.pipe, name, None)
            if isinstance(value, int):
                return value
        return 8

    def limit(self, order: Order) -> int:
        """The most orders of this one's key that may be made as one batch."""
        most = self.settings.max_batch
        steps = order.steps or int(self.loaded.call.get("num_inference_steps", 50))
        if most == 1 or decides_together(self._recipes[order.recipe], steps):
            return 1
        return self.proof.limit(order.key, most) if self.settings.exact else most

    def generate(self, orders: list[Order], stop: threading.Event) -> list[Made]:
        """Make orders of one key.

        Args:
            orders: as many as :meth:`limit` allows.
            stop: set when nobody waits for them any more; looked at between steps.

        Raises:
            Stopped: it was set.
            ValueError: the pipeline refuses what was asked for, as ``NotImplementedError``.
        """
        if len(orders) == 1 or not self.settings.exact:
            return self._run(orders, stop)[1]
        key, size = orders[0].key, len(orders)
        known = self.proof.known(key, size)
        if known:
            try:
                return self._run(orders, stop)[1]
            except Apart:
                return [self._run([order], stop)[1][0] for order in orders]
        alone = [self._run([order], stop) for order in orders]
        made = [each[1][0] for each in alone]
        if known is None and not any(each.fault for each in made):
            same = self._is_exact(orders, [pixels for pixels, _ in alone], stop)
            self.proof.saw(key, size, same)
            log.info("a batch of %d of %s is %s", size, key, "exact" if same else "not exact")
        return made

    def _is_exact(self, orders: list[Order], alone: list[Tensor], stop: threading.Event) -> bool:
        """Whether a batch has the bits of each alone; one that cannot be made has not."""
        try:
            together, batch = self._run(orders, stop)
        except Stopped:
            raise
        except Exception:  # the pictures are there already: only the batch is too much
            log.warning("a batch of %d cannot be made", len(orders), exc_info=True)
            return False
        same = all(torch.equal(a[0], b) for a, b in zip(alone, together, strict=True))
        return same and not batch[0].fault

    def _run(self, orders: list[Order], stop: threading.Event) -> tuple[Tensor, list[Made]]:
        """The pipeline's own pixels, and what is made of them.

        Raises:
            Apart: the engine failed, and nobody has looked whether a dense batch is exact.
        """
        first = orders[0]
        self._set(first.recipe, None if first.lora is None else (first.lora, first.lora_scale))
        start = time.perf_counter()
        fault = where = ""
        try:
            pixels = self._call(orders, stop)
        except Stopped:
            raise
        except Exception as error:
            if self.settings.size > 1:
                raise  # the other ranks are elsewhere by now
            fault = one_line(f"{type(error).__name__}: {error}", 300)
            where = traceback.format_exc()
        if fault:  # behind the handler, which holds the frames and what they hold
            self._take_off()
            if len(orders) > 1 and self.settings.exact:
                log.warning("the engine failed in a batch, which is made one by one: %s", where)
                raise Apart(fault)
            pixels = self._call(orders, stop)  # raises the same if it was not the engine
            log.warning("the engine failed, and was taken off for one request: %s", where)
        bytes_ = _bytes(pixels)
        seconds = time.perf_counter() - start
        cost: dict[str, Any] = {"recipe": DENSE, "fault": fault}
        if self._engine is not None:
            report = self._engine.report()
            cost = {
                "recipe": first.recipe,
                "flops_dense": sum(report.flops_dense.values()) / len(orders),
                "flops_executed": sum(report.flops_executed.values()) / len(orders),
                "cache_bytes": report.cache_bytes,
            }
        return pixels, [Made(each, seconds, batch=len(orders), **cost) for each in bytes_]

    def _call(self, orders: list[Order], stop: threading.Event) -> Tensor:
        """Pixels in [0, 1], ``[B, F, 3, H, W]``."""

        def on_step(pipe: Any, step: int, timestep: Any, values: dict) -> dict:
            if self._agree(stop.is_set()):
                raise Stopped
            return values

        first, size = orders[0], len(orders)
        call = {**self.loaded.call, **first.call(), "output_type": "pt"}
        if "callback_on_step_end" in self._takes:
            call["callback_on_step_end"] = on_step
        prompts = [order.prompt for order in orders]
        # On the CPU: there a seed gives the same noise whatever the card, and the batch.
        noise = [torch.Generator("cpu").manual_seed(order.seed) for order in orders]
        if first.negative is not None:
            negatives = [order.negative for order in orders]
            call["negative_prompt"] = negatives if size > 1 else negatives[0]
        call["prompt"] = prompts if size > 1 else prompts[0]
        call["generator"] = noise if size > 1 else noise[0]
        output = self.pipe(**call)
        return output.frames if hasattr(output, "frames") else output.images[:, None]

    def _set(self, recipe: str, lora: tuple[str, float] | None) -> None:
        """Put the pipeline into the state that an order asks for."""
        if lora != self._lora:
            self._set_lora(lora)
        if recipe != self._recipe:
            self._take_off()
            size = self.settings.size
            ranks: dict[str, Any] = {"ulysses": size} if size > 1 else {}
            self._engine = accelerate(self.pipe, self._recipes[recipe], **ranks)
            self._recipe = recipe

    def _set_lora(self, lora: tuple[str, float] | None) -> None:
        self._take_off()  # the engine looks at the modules that a LoRA replaces
        if self._lora is not None:
            self._lora = None
            self.pipe.unload_lora_weights()
        if lora is not None:
            name, scale = lora
            try:
                self.pipe.load_lora_weights(
                    self.settings.loras[name], adapter_name=ADAPTER, use_safetensors=True
                )
                self.pipe.set_adapters([ADAPTER], [scale])
            except BaseException:
                self.pipe.unload_lora_weights()  # half of it would be in the next pictures
                raise
            self._lora = lora

    def _take_off(self) -> None:
        if self._engine is not None:
            self._engine.remove()
        self._engine = self._recipe = None


def _bytes(pixels: Tensor) -> Tensor:
    """8 bits a channel as diffusers rounds them: ``[B, F, H, W, 3]`` on the host."""
    pixels = pixels.detach().float().nan_to_num(0.0, 0.0, 0.0).clamp(0, 1)
    return (pixels * 255).round().to(torch.uint8).movedim(-3, -1).contiguous().cpu()
