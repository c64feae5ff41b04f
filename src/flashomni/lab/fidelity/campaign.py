"""Run methods x prompts x seeds, bracketed by the stock pipeline, and keep every result on disk.

A result is a small JSON file named after what it depends on, beside its picture, written as soon
as its generation ends. A campaign that is interrupted, or given more methods, goes on where it
was. A score that is owed, because the scorer failed, is tried again on pixels that were kept.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from flashomni.lab import metrics
from flashomni.lab.fidelity.flops import count_flops
from flashomni.lab.fidelity.identity import OnBytes, code_of, weights_digest
from flashomni.lab.fidelity.judged import CAP_DB, judged
from flashomni.lab.fidelity.measures import load_measures, usual_measures
from flashomni.lab.fidelity.methods import DENSE, Method, parse_method
from flashomni.lab.fidelity.result import Case, Result
from flashomni.lab.fidelity.scorers import Scorer
from flashomni.lab.generation import Generation, OnStep
from flashomni.lab.versions import device_name, source_digest, versions
from flashomni.lab.zoo import Loaded
from flashomni.util.files import locked, write_bytes, write_text

BRACKET = 4  # methods between two runs of the stock pipeline
UNREST = 1.15  # if those two differ by more, somebody else used the machine: measure again,
ATTEMPTS = 3  # at most so often
WARM_STEPS = 8
PIXELS = ".safetensors"  # of a picture whose score is owed


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
        on_weights: told how many bytes of the weights, of how many, have been read: they are part
            of what a result depends on.
        measures: scores beside PSNR, SSIM and, where its package is there, FLIP; see
            :func:`flashomni.lab.fidelity.measures.load_measures`.

    Raises:
        ValueError: there is no method, prompt or seed; a method is named twice; a path of weights
            holds none.
        NotImplementedError: a measure that cannot run here.
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
        on_weights: OnBytes = lambda done, total: None,
        measures: Mapping[str, str] | None = None,
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
        self._scorer_code = None if scorer is None else code_of(scorer)
        self._scorer_error: Exception | None = None
        self._skipped: dict[str, float | None] = {}
        self._dense_flops: float | None = None
        self._device = torch.device(loaded.pipe._execution_device)
        self._measures = load_measures({**usual_measures(), **(measures or {})}, self._device)
        parameter = next(loaded.pipe.transformer.parameters())
        self._setting = {
            "model": model,
            "call": {**loaded.call, **({} if steps is None else {"num_inference_steps": steps})},
            "dtype": str(parameter.dtype),
            "device": device_name(self._device),
            "source": source_digest(),
            "versions": {k: v for k, v in versions(self._device).items() if k != "commit"},
            "weights": weights_digest(loaded.pipe, on_weights),
            **({"measures": dict(measures)} if measures else {}),
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
        """The result of a case that was run before; a score of another scorer is left out."""
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
        if result.scorer != self._scorer_code:
            result = replace(result, caption=None, dense_caption=None, scorer=None)
        return result

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

        Raises:
            RuntimeError: the scorer failed. What was generated is kept, and scored next time.
        """
        for prompt in self.prompts:
            for seed in self.seeds:
                cases = [Case(method, prompt, seed) for method in self.methods]
                missing = []
                for case in cases:
                    result = self._settled(case)
                    if result is None:
                        missing.append(case)
                    else:
                        yield result
                self._raise_scorer_error()
                if missing:
                    yield from self._round(missing, on_case)

    def _settled(self, case: Case) -> Result | None:
        """A stored result with its score, which may be made up for; ``None``: run the case."""
        result = self.stored(case)
        if result is None or not self._owes_score(result):
            return result
        try:
            pixels = safetensors.torch.load(self._file(case, PIXELS).read_bytes())
            pair = pixels["reference"], pixels["pixels"]
        except (OSError, safetensors.SafetensorError, KeyError):
            return None
        return self._scored(case, result, *pair)

    def _round(self, cases: list[Case], on_case: Callable[[Case], OnStep]) -> Iterator[Result]:
        """The missing methods of one prompt and seed, a few at a time between two stock runs."""
        generation = Generation(self.loaded, cases[0].prompt, cases[0].seed, self._steps)
        stock = Case(parse_method(DENSE), cases[0].prompt, cases[0].seed)
        for case in cases:
            self._prepare(case.method, generation)
        reference, before = generation.run(on_case(stock))
        self._save_picture(stock, reference)
        for start in range(0, len(cases), BRACKET):
            found: list[Result] = []
            some = cases[start : start + BRACKET]
            for attempt in range(ATTEMPTS):
                for i, case in enumerate(some):
                    run = self._generate(case, on_case(case))
                    if attempt == 0:
                        found.append(self._judge(case, run, reference, before))
                    else:  # the same picture; the times are the last ones
                        found[i] = replace(found[i], seconds=run.seconds, dense_seconds=before)
                        self._keep(case, found[i])
                after = generation.run(on_case(stock))[1]
                calm = max(before, after) <= UNREST * min(before, after)
                baseline, before = (before + after) / 2, after
                if calm:
                    break
            found = [replace(r, dense_seconds=baseline, bracketed=True) for r in found]
            for case, result in zip(some, found, strict=True):
                self._keep(case, result)
            yield from found
            self._raise_scorer_error()

    def _prepare(self, method: Method, generation: Generation) -> None:
        """Once a method: what it learns, its FLOPs if it does not count them, and a warm-up."""
        if method.name in self._skipped:
            return
        if not self._skipped:
            generation.warm_up()
        pipe, steps = generation.pipe, generation.num_steps
        method.prepare(pipe, steps, generation.discard)
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
                short.discard()
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

    def _judge(self, case: Case, run: _Run, reference: Tensor, before: float) -> Result:
        """Say how far a new picture is from the stock one; keep that, the picture, the score."""
        pixels = run.pixels
        names = (DENSE, case.method.name)
        found = judged(reference, pixels, names, case.prompt, self._measures)
        scores = dict(found.measures)
        lpips, flip = scores.pop("lpips", None), scores.pop("flip", None)
        small = min(pixels.shape[-2:]) < metrics.LPIPS_PIXELS
        if "lpips" not in self._measures and not small and found.failure is None:
            lpips = None if metrics.why_no_lpips() else metrics.lpips(reference, pixels)
        result = Result(
            method=case.method.name,
            family=case.method.family,
            prompt=case.prompt,
            seed=case.seed,
            steps=run.steps,
            seconds=run.seconds,
            dense_seconds=before,
            psnr_db=None if found.identical else found.psnr_db,
            ssim=found.ssim,
            lpips=lpips,
            temporal_db=None if found.temporal_db == CAP_DB else found.temporal_db,
            caption=None,
            dense_caption=None,
            flops_skipped=run.flops_skipped,
            versions=versions(self._device),
            bracketed=False,
            failure=found.failure,
            flip=flip,
            measures=scores,
        )
        self._save_picture(case, pixels)
        self._keep(case, result)
        return self._scored(case, result, reference, pixels) if self._owes_score(result) else result

    def _owes_score(self, result: Result) -> bool:
        unscored = self._scorer is not None and result.scorer is None
        return unscored and result.failure is None

    def _scored(self, case: Case, result: Result, reference: Tensor, pixels: Tensor) -> Result:
        """The result with its score; if the scorer fails, without, and the pixels are kept."""
        assert self._scorer is not None
        try:
            captions = [self._scorer(some, case.prompt) for some in (pixels, reference)]
            for right, count in captions:
                if not 0 <= int(right) <= int(count):
                    raise ValueError(f"it must give (right, all), got {(right, count)!r}")
        except BaseException as error:
            both = {"reference": reference.contiguous(), "pixels": pixels.contiguous()}
            write_bytes(self._file(case, PIXELS), safetensors.torch.save(both))
            if not isinstance(error, Exception):
                raise
            self._scorer_error = self._scorer_error or error
            return result
        caption, dense = ((int(right), int(count)) for right, count in captions)
        scored = replace(result, caption=caption, dense_caption=dense, scorer=self._scorer_code)
        self._keep(case, scored)
        self._file(case, PIXELS).unlink(missing_ok=True)
        return scored

    def _raise_scorer_error(self) -> None:
        error, self._scorer_error = self._scorer_error, None
        if error is not None:
            raise RuntimeError(
                f"the scorer failed ({type(error).__name__}: {error}); what was generated is kept "
                "and is scored when the campaign goes on"
            ) from error

    def _keep(self, case: Case, result: Result) -> None:
        """Store a result, unless another campaign has stored a more complete one meanwhile."""
        path = self._file(case, ".json")
        with locked(path.parent):
            there = self.stored(case)
            if there is not None and not result.bracketed and there.bracketed:
                if there.scorer is not None or result.scorer is None:
                    return
                result = replace(
                    there,
                    caption=result.caption,
                    dense_caption=result.dense_caption,
                    scorer=result.scorer,
                )
            write_text(path, json.dumps(asdict(result), indent=2, allow_nan=False) + "\n")

    def _save_picture(self, case: Case, pixels: Tensor) -> None:
        middle = pixels[len(pixels) // 2].nan_to_num(0.0).permute(1, 2, 0)
        buffer = io.BytesIO()
        Image.fromarray((middle * 255).round().byte().numpy()).save(buffer, format="PNG")
        write_bytes(self.picture(case), buffer.getvalue())
