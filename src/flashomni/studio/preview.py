"""A small picture of what a generation holds so far, from its latents."""

from __future__ import annotations

import inspect
import logging
import time
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

log = logging.getLogger("flashomni")
SHARE = 0.25  # of the time of a run that previews may take
LONGEST = 384  # pixels of a side: latents are pooled until their picture is no larger


class Preview:
    """Decodes latents of one generation, pooled small; a video shows its middle frame.

    Of flow matching it shows where the last step was heading, the clean picture that it predicts,
    instead of what is still noise.

    Args:
        pipe: a diffusers pipeline.
        call: arguments of its call.

    Attributes:
        why_not: why there is nothing to see, once that is known.
    """

    def __init__(self, pipe: Any, call: dict[str, Any]) -> None:
        self._pipe, self._call = pipe, call
        self._before: Tensor | None = None
        self._begun, self._spent = time.perf_counter(), 0.0
        self.why_not = ""

    def now_and_then(self, step: int, latents: Tensor | None, live: bool) -> Image.Image | None:
        """The picture after a step, if there is time for one: of all time it takes a share.

        Args:
            step: from 0; each is told.
            latents: as the pipeline has them.
            live: whether anybody wants to see some.
        """
        before = time.perf_counter()
        wanted = live and self._spent <= SHARE * (before - self._begun)
        picture = self(step, latents, wanted)
        self._spent += time.perf_counter() - before
        return picture

    def __call__(
        self, step: int, latents: Tensor | None, wanted: bool = True
    ) -> Image.Image | None:
        """The picture after a step; ``None`` where it cannot be made.

        Args:
            step: from 0. Each is told, wanted or not: the next one needs it.
            latents: as the pipeline has them, packed or not.
            wanted: whether there is time for a picture.
        """
        before, self._before = self._before, latents
        if self.why_not or latents is None or not wanted:
            return None
        try:
            heading = self._heading(step, before, latents)
            with torch.no_grad():
                return _image(self._decoded(self._unpacked(heading[:1])))
        except Exception as error:  # a pipeline may keep its latents any way it likes
            self.why_not = f"no live preview of {type(self._pipe).__name__}: {error}"
            log.info(self.why_not)
            return None

    def _heading(self, step: int, before: Tensor | None, latents: Tensor) -> Tensor:
        """Latents at noise 0, on the line through the last two steps.

        Of a multistep solver of flow matching, such as Wan's, the line is the mean of what it took.
        """
        scheduler = self._pipe.scheduler
        straight = type(scheduler).__name__.startswith("FlowMatchEuler")
        if before is None or not (straight or scheduler.config.get("use_flow_sigmas", False)):
            return latents
        now, then = float(scheduler.sigmas[step + 1]), float(scheduler.sigmas[step])
        velocity = (latents.float() - before.float()) / (now - then)
        return (latents.float() - now * velocity).to(latents.dtype)

    def _unpacked(self, latents: Tensor) -> Tensor:
        """``[1, C, H, W]``, or ``[1, C, 1, H, W]`` of a video's middle frame."""
        if latents.ndim == 3:
            unpack = getattr(self._pipe, "_unpack_latents", None)
            if unpack is None:
                raise ValueError(f"its latents are {list(latents.shape)}")
            scale = self._pipe.vae_scale_factor
            size = {"height": None, "width": None}
            for name in size:
                usual = getattr(self._pipe, "default_sample_size", 0) * scale
                size[name] = self._call.get(name) or usual
            known = {"latents": latents, "vae_scale_factor": scale, **size}
            wanted = inspect.signature(unpack).parameters
            latents = unpack(**{name: known[name] for name in wanted})
        if latents.ndim == 5:
            middle = latents.shape[2] // 2
            latents = latents[:, :, middle : middle + 1]
        return latents

    def _decoded(self, latents: Tensor) -> Tensor:
        """``[3, H, W]`` in [0, 1]."""
        vae = self._pipe.vae
        config = vae.config
        names = ("vae_scale_factor", "vae_scale_factor_spatial")
        scale = next(filter(None, (getattr(self._pipe, name, None) for name in names)), 8)
        pool = -(-max(latents.shape[-2:]) * scale // LONGEST)
        if pool > 1:
            size = [max(edge // pool, 1) for edge in latents.shape[-2:]]
            shape = (*latents.shape[:-2], *size)
            latents = functional.interpolate(
                latents.reshape(1, -1, *latents.shape[-2:]), size, mode="area"
            ).reshape(shape)
        mean, spread = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is not None and spread is not None:
            shape = (1, -1, *[1] * (latents.ndim - 2))
            shift, scales = (latents.new_tensor(x).view(shape) for x in (mean, spread))
            latents = latents * scales + shift
        else:
            latents = latents / config.scaling_factor + (getattr(config, "shift_factor", 0) or 0)
        pixels = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        pixels = pixels[0, :, 0] if pixels.ndim == 5 else pixels[0]
        return (pixels.float() / 2 + 0.5).clamp(0, 1)


def _image(pixels: Tensor) -> Image.Image:
    array = (pixels.nan_to_num(0.0) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array)
