"""Run methods x prompts x seeds, bracketed by the stock pipeline, and keep every result on disk.

A result is a small JSON file named after what it depends on, beside its picture. A campaign that
is interrupted, or given more methods, goes on where it was.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from flashomni.lab import metrics
from flashomni.lab.fidelity.methods import DENSE, Method, parse_method
from flashomni.lab.generation import Generation, OnStep
from flashomni.lab.versions import device_name, source_digest, versions
from flashomni.lab.zoo import Loaded
from flashomni.util.files import write_bytes, write_text

# A picture's (right, all) statements about its prompt.
Scorer = Callable[[Tensor, str], tuple[int, int]]
BRACKET = 4  # methods between two runs of the stock pipeline
UNREST = 1.15  # if those two differ by more, somebody else used the machine: measure again,
ATTEMPTS = 3  # at most so often
WARM_STEPS = 8


@dataclass(frozen=True)
class Case:
    """One generation: a method, a prompt, a seed."""

    method: Method
    prompt: str
    seed: int


@dataclass(frozen=True)
class Result:
    """What one generation gave, against the stock pipeline's of the same prompt and seed.

    Attributes:
        method: its name.
        family: its family.
        prompt: text.
        seed: of the initial noise.
        steps: denoising steps.
        seconds: the whole pipeline call.
        dense_seconds: the stock pipeline, mean of its runs before and after this one.
        psnr_db: ``None`` if the frames are identical.
        ssim: mean over frames.
        lpips: ``None`` where it cannot be measured.
        temporal_db: PSNR of the change from frame to frame; ``None`` for pictures, or if identical.
        caption: ``(right, all)`` statements of the prompt, or ``None`` without a scorer.
        dense_caption: the same of the stock pipeline's picture.
        flops_skipped: share of FLOPs that was not executed.
        versions: of what took part.
    """

    method: str
    family: str
    prompt: str
    seed: int
    steps: int
    seconds: float
    dense_seconds: float
    psnr_db: float | None
    ssim: float
    lpips: float | None
    temporal_db: float | None
    caption: tuple[int, int] | None
    dense_caption: tuple[int, int] | None
    flops_skipped: float
    versions: dict[str, str]

    @property
    def speedup(self) -> float:
        return self.dense_seconds / self.seconds


@dataclass(frozen=True)
class _Run:
    """What one generation left behind."""

    pixels: Tensor
    seconds: float
    steps: int
    flops_skipped: float


class Campaign:
    """Methods x prompts x seeds on one pipeline.

    Args:
        model: what the user calls it.
        loaded: the pipeline and its call.
        methods: ways to generate; the stock pipeline is always run.
        prompts: texts.
        seeds: of the initial noise.
        folder: where results and pictures are kept.
        scorer: reads pictures and judges their captions.
        steps: overrides the call's number of steps.

    Raises:
        ValueError: there is no method, prompt or seed, or a method is named twice.
    """

    def __init__(
        self,
        model: str,
        loaded: Loaded,
        methods: list[Method],
        prompts: list[str],
        seeds: list[int],
        folder: str | Path,
        scorer: Scorer | None = None,
        steps: int | None = None,
    ) -> None:
        for name, values in (("methods", methods), ("prompts", prompts), ("seeds", seeds)):
            if not values:
                raise ValueError(f"{name} must not be empty")
        names = [method.name for method in methods]
        if len(set(names)) < len(names) or DENSE in names:
            raise ValueError(f"methods must differ and leave out {DENSE!r}, got {', '.join(names)}")
        self.model, self.loaded, self.methods = model, loaded, methods
        self.prompts, self.seeds, self.folder = prompts, seeds, Path(folder)
        self._scorer, self._steps = scorer, steps
        self._skipped: dict[str, float | None] = {}
        self._dense_flops: float | None = None
        self._device = torch.device(loaded.pipe._execution_device)
        parameter = next(loaded.pipe.transformer.parameters())
        self._setting = {
            "model": model,
            "call": {**loaded.call, **({} if steps is None else {"num_inference_steps": steps})},
            "dtype": str(parameter.dtype),
            "device": device_name(self._device),
            "source": source_digest(),
            "versions": {k: v for k, v in versions(self._device).items() if k != "commit"},
            "weights": weights_digest(loaded.pipe),
        }

    def __len__(self) -> int:
        return len(self.methods) * len(self.prompts) * len(self.seeds)

    def cases(self) -> list[Case]:
        """All of them, prompt by prompt, so that the stock pipeline runs near each."""
        return [
            Case(method, prompt, seed)
            for prompt in self.prompts
            for seed in self.seeds
            for method in self.methods
        ]

    def _file(self, case: Case, suffix: str) -> Path:
        """A case's file; it names the method and hashes all that the result depends on."""
        identity = {
            **self._setting,
            "method": case.method.spec,
            "prompt": case.prompt,
            "seed": case.seed,
        }
        text = json.dumps(identity, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", case.method.name).strip("-")[:60]
        return self.folder / "cases" / f"{slug}-{digest}{suffix}"

    def stored(self, case: Case) -> Result | None:
        """The result of a case that was run before."""
        path = self._file(case, ".json")
        if not path.exists():
            return None
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            for key in ("caption", "dense_caption"):
                data[key] = None if data[key] is None else tuple(data[key])
            result = Result(**data)
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None  # cut, or not ours: run again
        if (result.method, result.prompt, result.seed) != (
            case.method.name,
            case.prompt,
            case.seed,
        ):
            return None
        lacks_score = self._scorer is not None and result.caption is None
        return None if lacks_score else result

    def picture(self, case: Case) -> Path:
        """The case's picture, the middle frame of a video: a PNG."""
        return self._file(case, ".png")

    def results(self) -> list[Result]:
        """Every stored result, in the order of :meth:`cases`."""
        found = [self.stored(case) for case in self.cases()]
        return [result for result in found if result is not None]

    def run(self, on_case: Callable[[Case], OnStep]) -> Iterator[Result]:
        """Run what is missing; give every result of the campaign as it is known.

        Args:
            on_case: called before each generation; gives the callback for its steps.
        """
        for prompt in self.prompts:
            for seed in self.seeds:
                cases = [Case(method, prompt, seed) for method in self.methods]
                missing = []
                for case in cases:
                    result = self.stored(case)
                    if result is None:
                        missing.append(case)
                    else:
                        yield result
                if missing:
                    yield from self._round(missing, on_case)

    def _round(self, cases: list[Case], on_case: Callable[[Case], OnStep]) -> Iterator[Result]:
        """The missing methods of one prompt and seed, a few at a time between two stock runs."""
        generation = Generation(self.loaded, cases[0].prompt, cases[0].seed, self._steps)
        stock = Case(parse_method(DENSE), cases[0].prompt, cases[0].seed)
        for case in cases:
            self._prepare(case.method, generation)
        reference, before = generation.run(on_case(stock))
        self._save_picture(stock, reference)
        for start in range(0, len(cases), BRACKET):
            some = cases[start : start + BRACKET]
            for _ in range(ATTEMPTS):
                runs = [self._generate(case, on_case(case)) for case in some]
                after = generation.run(on_case(stock))[1]
                calm = max(before, after) <= UNREST * min(before, after)
                baseline, before = (before + after) / 2, after
                if calm:
                    break
            for case, run in zip(some, runs, strict=True):
                result = self._judge(case, run, reference, baseline)
                self._save_picture(case, run.pixels)
                text = json.dumps(asdict(result), indent=2, allow_nan=False)
                write_text(self._file(case, ".json"), text + "\n")
                yield result

    def _prepare(self, method: Method, generation: Generation) -> None:
        """Once a method: what it learns, its FLOPs if it does not count them, and a warm-up."""
        if method.name in self._skipped:
            return
        if not self._skipped:
            generation.warm_up()
        pipe, steps = generation.pipe, generation.num_steps
        method.prepare(pipe, steps, lambda: _discard(generation))
        if method.steps is not None:
            self._skipped[method.name] = 1.0 - method.steps / steps
        elif method.family == "peers":
            if self._dense_flops is None:
                self._dense_flops = count_flops(generation)
            with method.attach(pipe, steps):
                executed = count_flops(generation)
            self._skipped[method.name] = 1.0 - executed / self._dense_flops
        else:
            few = min(steps, WARM_STEPS)
            short = Generation(self.loaded, generation.prompt, generation.seed, few)
            with method.attach(pipe, few):
                _discard(short)
            self._skipped[method.name] = None

    def _generate(self, case: Case, on_step: OnStep) -> _Run:
        steps = self._steps if case.method.steps is None else case.method.steps
        generation = Generation(self.loaded, case.prompt, case.seed, steps)
        with case.method.attach(generation.pipe, generation.num_steps) as attached:
            pixels, seconds = generation.run(on_step)
            skipped = attached.flops_skipped()
        if skipped is None:
            skipped = self._skipped[case.method.name]
        assert skipped is not None, f"nobody counts the FLOPs of {case.method.name}"
        return _Run(pixels, seconds, generation.num_steps, skipped)

    def _judge(self, case: Case, run: _Run, reference: Tensor, dense_seconds: float) -> Result:
        pixels, is_video = run.pixels, len(run.pixels) > 1
        lpips = metrics.lpips(reference, pixels) if metrics.why_no_lpips() is None else None
        temporal = metrics.temporal_psnr(reference, pixels) if is_video else math.inf
        return Result(
            method=case.method.name,
            family=case.method.family,
            prompt=case.prompt,
            seed=case.seed,
            steps=run.steps,
            seconds=run.seconds,
            dense_seconds=dense_seconds,
            psnr_db=_finite(metrics.psnr(reference, pixels)),
            ssim=metrics.ssim(reference, pixels),
            lpips=lpips,
            temporal_db=_finite(temporal),
            caption=self._score(pixels, case.prompt),
            dense_caption=self._score(reference, case.prompt),
            flops_skipped=run.flops_skipped,
            versions=versions(self._device),
        )

    def _score(self, pixels: Tensor, prompt: str) -> tuple[int, int] | None:
        return None if self._scorer is None else self._scorer(pixels, prompt)

    def _save_picture(self, case: Case, pixels: Tensor) -> None:
        middle = (pixels[len(pixels) // 2].permute(1, 2, 0) * 255).round().byte().numpy()
        buffer = io.BytesIO()
        Image.fromarray(middle).save(buffer, format="PNG")
        write_bytes(self.picture(case), buffer.getvalue())


class _FlopCounter(TorchDispatchMode):
    """Sums torch's own FLOP formulas; unlike FlopCounterMode it does not walk the module tree,
    which has cycles under some peers."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet == torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            self.total += sdpa_flop_count(*(x.shape for x in args[:3]))  # torch's table lacks it
        elif packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


def weights_digest(pipe: Any) -> str:
    """Hash of every weight and setting that the pipeline holds, wherever they came from."""
    digest = hashlib.sha256()
    for name, part in sorted(pipe.components.items()):
        digest.update(f"{name} {type(part).__name__} {getattr(part, 'config', None)}".encode())
        if isinstance(part, torch.nn.Module):
            for key, tensor in part.state_dict().items():
                digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
                raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
                digest.update(raw.numpy().data)
    return digest.hexdigest()[:16]


def count_flops(generation: Generation) -> float:
    """FLOPs of the transformer in one generation, counted by torch; slow, and not timed."""
    model, counter = generation.pipe.transformer, _FlopCounter()

    def start(*_: Any) -> None:
        counter.__enter__()

    def stop(*_: Any) -> None:
        counter.__exit__(None, None, None)

    handles = [
        model.register_forward_pre_hook(start),
        model.register_forward_hook(stop, always_call=True),
    ]
    try:
        _discard(generation)
    finally:
        for handle in handles:
            handle.remove()
    return float(counter.total)


def _discard(generation: Generation) -> None:
    generation.run(lambda step, total: None)


def _finite(value: float) -> float | None:
    return None if math.isinf(value) else value
