"""Dense runs, recorded: what the model returned at each step, and their Gram matrix.

One run a prompt evaluates every schedule and every linear forecast without running anything: the
error of a forecast is a quadratic form of the inner products (DPCache, 2602.22654, measures the
same errors segment by segment). Recordings lie on disk, and in memory as far as they may.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from flashomni.tuning.drive import Answer, Compute, Driver, OnLatents, Outline
from flashomni.util.files import write_bytes

CHUNK = 1 << 20  # elements of a step that are on the device at a time, in double precision


@dataclass(frozen=True)
class Recording:
    """One dense run.

    Args:
        prompt: of the run.
        seed: of its noise.
        outputs: of each step, of each call of the model in it (guidance makes several), in the
            model's dtype, on the host.
        latents: at the end, flat, fp32, on the host.
    """

    prompt: str
    seed: int
    outputs: tuple[tuple[Tensor, ...], ...]
    latents: Tensor

    @property
    def num_steps(self) -> int:
        return len(self.outputs)

    @property
    def rows(self) -> int:
        """Parts of a step's outputs that guidance combines: calls, and items of their batches."""
        return sum(len(output) for output in self.outputs[0])

    def step(self, step: int, device: torch.device, part: slice = slice(None)) -> Tensor:
        """The outputs of one step, or a part of their elements: ``[rows, elements]``, fp32."""
        parts = [output.flatten(1)[:, part].to(device).float() for output in self.outputs[step]]
        return torch.cat(parts)

    def save(self, path: Path) -> None:
        """Write a safetensors file; it appears whole or not at all."""
        tensors = {
            f"{step}.{call}": output.contiguous()
            for step, outputs in enumerate(self.outputs)
            for call, output in enumerate(outputs)
        }
        content = safetensors.torch.save(
            {**tensors, "latents": self.latents},
            metadata={"prompt": self.prompt, "seed": str(self.seed)},
        )
        write_bytes(path, content)

    @classmethod
    def load(cls, path: Path) -> Recording:
        """What :meth:`save` wrote.

        Raises:
            OSError, ValueError: it cannot be read; ``SafetensorError`` is a ``ValueError`` here.
        """
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                about = file.metadata()
                found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except safetensors.SafetensorError as error:
            raise ValueError(f"recording {path} cannot be read: {error}") from error
        latents = found.pop("latents")
        outputs: dict[int, dict[int, Tensor]] = {}
        for key, tensor in found.items():
            step, call = map(int, key.split("."))
            outputs.setdefault(step, {})[call] = tensor
        ordered = tuple(
            tuple(calls[call] for call in sorted(calls))
            for calls in (outputs[step] for step in sorted(outputs))
        )
        return cls(about["prompt"], int(about["seed"]), ordered, latents)


def record(
    driver: Driver,
    prompt: str,
    seed: int,
    on_latents: OnLatents | None = None,
    see: Answer = lambda step, call, compute: compute(),
) -> Recording:
    """Run the pipeline once, dense, and keep what its model returns.

    Args:
        driver: of the pipeline.
        prompt: of the run.
        seed: of its noise.
        on_latents: given the latents behind each step.
        see: computes each call, and may look at it.
    """
    outputs: list[list[Tensor]] = []

    def keep(step: int, call: int, compute: Compute) -> Tensor:
        value = see(step, call, compute)
        if step == len(outputs):
            outputs.append([])
        outputs[step].append(value.detach().cpu())
        return value

    latents = driver.run(prompt, seed, keep, on_latents)
    return Recording(prompt, seed, tuple(map(tuple, outputs)), latents.cpu())


def needed_bytes(outline: Outline) -> int:
    """Bytes of one recording on the host, which are also its bytes on disk."""
    return outline.num_steps * outline.output_bytes


def gram(recording: Recording, effects: np.ndarray, device: torch.device) -> np.ndarray:
    """Inner products of the outputs as the scheduler gets them, over those of the final latents.

    Args:
        recording: of a dense run.
        effects: ``[T, rows]``, what a unit of each row at each step does to the final latents.
        device: where to compute.

    Returns:
        ``[T, T]`` in double precision; an error ``e`` of weights over steps, each in units of the
        final latents, has the relative square norm ``e @ gram @ e``.
    """
    shares = torch.from_numpy(effects / effects.sum(1, keepdims=True)).to(device)
    width = recording.step(0, torch.device("cpu")).shape[1]
    products = torch.zeros(recording.num_steps, recording.num_steps, dtype=torch.float64)
    for start in range(0, width, CHUNK):
        part = slice(start, start + CHUNK)
        values = torch.stack(
            [
                shares[step] @ recording.step(step, device, part).double()
                for step in range(recording.num_steps)
            ]
        )
        products += (values @ values.T).cpu()
    return products.numpy() / float(recording.latents.double().square().sum())
