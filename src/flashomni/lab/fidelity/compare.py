"""``flashomni.compare``: methods on a pipeline that somebody has, against the pipeline as it is.

Each method is put on once and generates every prompt with every seed, so that its graphs and
kernels are warm, as they are for who generates many. Times are of single pictures.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flashomni.engine import Recipe
from flashomni.lab.fidelity.comparison import Comparison, Picture, Timed
from flashomni.lab.fidelity.judged import judged
from flashomni.lab.fidelity.measures import Measure, load_measures
from flashomni.lab.fidelity.methods import DENSE, Attached, Method, of_recipe, parse_method
from flashomni.lab.versions import device_name

OnMethod = Callable[[str, int, int], None]
# (method, number of the prompt, seed, the pipeline's own pixels, the method's)
OnPicture = Callable[[str, int, int, Tensor, Tensor], None]
References = dict[int, dict[tuple[int, int], Tensor]]  # batch size -> (prompt, seed) -> pixels
WARM = 2  # generations that nobody times: kernels compile, graphs are recorded


def compare(
    pipe: Any,
    methods: Sequence[str | Recipe | Method],
    prompts: str | Sequence[str],
    *,
    seeds: Sequence[int] = (0, 1),
    call: Mapping[str, Any] | None = None,
    steps: int | None = None,
    batch: int = 1,
    rounds: int = 3,
    pictures: bool = True,
    enough: float = math.inf,
    timed: Any = None,
    seconds: float | None = None,
    measures: Mapping[str, str] | None = None,
    backend: str | None = None,
    references: References | None = None,
    in_turn: bool = False,
    clock: Callable[[], float] = time.perf_counter,
    on_method: OnMethod = lambda name, done, total: None,
    on_picture: OnPicture = lambda method, prompt, seed, reference, pixels: None,
) -> Comparison:
    """Fidelity and time of methods on a pipeline, paired over prompts and seeds.

    Args:
        pipe: a diffusers pipeline, with whatever adapters it has.
        methods: recipes, or names: what ``Recipe.of`` takes, ``steps=14``, a peer
            (``diffusers.mag:threshold=.12``).
        prompts: texts.
        seeds: of the initial noise.
        call: further arguments of the pipeline's call (``height``, ``guidance_scale``, ...).
        steps: denoising steps; the pipeline's own if neither this nor ``call`` says it.
        batch: prompts in one call where only pictures are looked at, not times. Methods that decide
            by what they see decide for one picture alone, whatever this says.
        rounds: timed generations of each method, of single pictures; 0 times nothing, and seconds
            are NaN: for comparisons whose times another one has (:meth:`Comparison.merged`).
        pictures: whether any are looked at; ``False`` takes times alone.
        enough: seconds of timed generations behind which a method has no further one, but two.
        timed: the pipeline that times are of, ``pipe`` if left out: rounding of bfloat16 hides what
            methods do, so that pictures may be of the same weights in float32.
        seconds: when so many have passed no further method is begun; :attr:`Comparison.left_out`
            names those that are missing.
        measures: scores beside PSNR and SSIM, by name, and where their weights are (``flip`` has
            none); see :func:`flashomni.lab.fidelity.measures.load_measures`.
        backend: kernel backend of recipes.
        references: what the pipeline makes as it is: taken from here, and kept here for a further
            comparison of the same pipeline, prompts, seeds and call. Dropped if left out.
        in_turn: time every picture, the stock pipeline's and behind it those of all methods: for a
            CPU, where nothing is compiled, a picture takes long and the machine has other work.
            Then ``seconds`` ends it behind a picture of all methods, where a further one would
            not be done by then; ``rounds`` is not used.
        clock: seconds that times are differences of; see :func:`processor_time`.
        on_method: told the name of each method, how many are done, and of how many; ``in_turn``
            of pictures.
        on_picture: given each picture as it is made: method, number of the prompt, seed, what the
            pipeline makes as it is, and what the method made; fp32 ``[F, 3, H, W]`` in [0, 1].

    Raises:
        ValueError: there is no method, prompt or seed; a method is named twice; a path of weights
            holds none; ``in_turn`` where kernels are compiled, with batches or another ``timed``.
        NotImplementedError: a peer or a measure that cannot run here.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    chosen = [_method(each, backend) for each in methods]
    for name, values in (("methods", chosen), ("prompts", prompts), ("seeds", seeds)):
        if not values:
            raise ValueError(f"{name} must not be empty")
    names = [method.name for method in chosen]
    if len(set(names)) < len(names) or DENSE in names:
        raise ValueError(f"methods must differ and leave out {DENSE!r}, got {', '.join(names)}")
    scores = load_measures(measures or {}, torch.device(pipe._execution_device))
    timed = pipe if timed is None else timed
    for each in (pipe, timed):
        each.set_progress_bar_config(disable=True)
    given = dict(call or {}) if steps is None else {**(call or {}), "num_inference_steps": steps}
    kept = {} if references is None else references
    work = _Work(
        pipe,
        timed,
        given,
        prompts,
        list(seeds),
        batch,
        rounds,
        enough,
        scores,
        kept,
        clock,
        on_picture,
    )
    if in_turn:
        if work._compiles or batch > 1 or timed is not pipe or not pictures:
            raise ValueError(
                "in_turn must be left out where kernels are compiled, with batch above 1, with "
                "pictures=False or another timed: each method is put on anew for each picture"
            )
        return work.run_in_turn(chosen, seconds, on_method)
    return work.run(chosen, pictures, seconds, on_method)


def processor_time() -> float:
    """Seconds of the processor's time of this process, for each thread that torch uses.

    A ``clock`` of :func:`compare` on a machine that others use too: waiting for a core does not
    count. Where all threads work all the time it is the time that passes on one that is free.
    """
    return time.process_time() / torch.get_num_threads()


def _method(given: str | Recipe | Method, backend: str | None) -> Method:
    if isinstance(given, Method):
        return given
    if isinstance(given, Recipe):
        return of_recipe(given.name, given, backend)
    return parse_method(str(given), backend)


@dataclass
class _Work:
    """One comparison under way."""

    pipe: Any
    timed: Any
    call: dict[str, Any]
    prompts: list[str]
    seeds: list[int]
    batch: int
    rounds: int
    enough: float
    scores: Mapping[str, Measure]
    references: References
    clock: Callable[[], float]
    on_picture: OnPicture

    def run(
        self, methods: list[Method], looks: bool, seconds: float | None, tell: OnMethod
    ) -> Comparison:
        start = time.perf_counter()
        pictures: list[Picture] = []
        times: list[Timed] = []
        left_out: list[str] = []
        tell(DENSE, 0, len(methods))
        dense = self._times(self.num_steps)
        for number, method in enumerate(methods):
            if seconds is not None and time.perf_counter() - start > seconds:
                left_out.append(method.name)
                continue
            tell(method.name, number, len(methods))
            method.prepare(self.pipe, self.num_steps, self._discard)
            size = 1 if method.alone else self.batch
            references = self._dense_of(size) if looks else {}
            count = self.num_steps if method.steps is None else method.steps
            with method.attach(self.timed, count) as attached:
                mine = statistics.median(self._times(count))
                if looks and self.timed is self.pipe:
                    pictures += self._pictures(method, size, count, references, attached)
            if looks and self.timed is not self.pipe:
                with method.attach(self.pipe, count) as attached:
                    pictures += self._pictures(method, size, count, references, attached)
            after = self._times(self.num_steps, rounds=1)
            times.append(Timed(method.name, method.family, mine, statistics.median(dense + after)))
            dense = dense[-2:] + after
        device = torch.device(self.pipe._execution_device)
        return Comparison.of(pictures, times, device, left_out, time.perf_counter() - start)

    @property
    def num_steps(self) -> int:
        return int(self.call.get("num_inference_steps", 50))

    def run_in_turn(
        self, methods: list[Method], seconds: float | None, tell: OnMethod
    ) -> Comparison:
        """Every picture is timed: the stock pipeline's, and behind it those of all methods."""
        start = time.perf_counter()
        pictures: list[Picture] = []
        for method in methods:
            method.prepare(self.pipe, self.num_steps, self._discard)
        whole = [(prompt, seed) for prompt in range(len(self.prompts)) for seed in self.seeds]
        for number, (prompt, seed) in enumerate(whole):
            spent = time.perf_counter() - start
            if number and seconds is not None and spent + spent / number > seconds:
                break
            text = self.prompts[prompt : prompt + 1]
            tell(DENSE, number, len(whole))
            begun = self.clock()
            reference = self._generate(self.pipe, text, seed, self.num_steps)[0]
            dense = self.clock() - begun
            for method in methods:
                tell(method.name, number, len(whole))
                count = self.num_steps if method.steps is None else method.steps
                with method.attach(self.pipe, count) as attached:
                    begun = self.clock()
                    pixels = self._generate(self.pipe, text, seed, count)[0]
                    taken = self.clock() - begun
                    made = self._picture(method, count, attached, prompt, seed, reference, pixels)
                pictures.append(replace(made, seconds=taken, dense_seconds=dense))
        device = device_name(torch.device(self.pipe._execution_device))
        families = {method.name: method.family for method in methods}
        return Comparison.of_timed(pictures, families, device, time.perf_counter() - start)

    def _dense_of(self, size: int) -> dict[tuple[int, int], Tensor]:
        """What the pipeline makes as it is, in batches of a size; made once."""
        if size not in self.references:
            made = self._calls(size, self.num_steps)
            self.references[size] = {
                (start + place, seed): pixels
                for seed, start, batch in made
                for place, pixels in enumerate(batch)
            }
        return self.references[size]

    def _pictures(
        self, method: Method, size: int, steps: int,
        references: Mapping[tuple[int, int], Tensor], attached: Attached,
    ) -> Iterator[Picture]:  # fmt: skip
        for seed, start, batch in self._calls(size, steps):
            for place, pixels in enumerate(batch):
                prompt = start + place
                reference = references[prompt, seed]
                yield self._picture(method, steps, attached, prompt, seed, reference, pixels)

    def _picture(
        self, method: Method, steps: int, attached: Attached, prompt: int, seed: int,
        reference: Tensor, pixels: Tensor,
    ) -> Picture:  # fmt: skip
        stock = method.steps is not None  # fewer steps of it
        text = self.prompts[prompt]
        self.on_picture(method.name, prompt, seed, reference, pixels)
        found = judged(reference, pixels, (DENSE, method.name), text, self.scores)
        return Picture(
            method=method.name,
            prompt=prompt,
            seed=seed,
            psnr_db=found.psnr_db,
            ssim=found.ssim,
            temporal_db=found.temporal_db,
            computed=steps if stock else attached.computed(),
            flops_skipped=1 - steps / self.num_steps if stock else attached.flops_skipped(),
            attention_spent=attached.attention_spent(),
            measures=found.measures,
            num_steps=steps,
        )

    def _calls(self, size: int, steps: int) -> Iterator[tuple[int, int, Tensor]]:
        """Seed, number of the first prompt, and the pictures of every call."""
        for seed in self.seeds:
            for start in range(0, len(self.prompts), size):
                some = self.prompts[start : start + size]
                yield seed, start, self._generate(self.pipe, some, seed, steps)

    def _generate(self, pipe: Any, prompts: list[str], seed: int, steps: int) -> Tensor:
        """Pixels fp32 ``[B, F, 3, H, W]`` in [0, 1], on the device; F is 1 for pictures."""
        noise = [torch.Generator("cpu").manual_seed(seed) for _ in prompts]
        output = pipe(
            prompts if len(prompts) > 1 else prompts[0],
            **{**self.call, "num_inference_steps": steps},
            generator=noise if len(prompts) > 1 else noise[0],
            output_type="pt",
        )
        pixels = output.frames if hasattr(output, "frames") else output.images[:, None]
        return pixels.detach().float().clamp(0, 1)

    def _discard(self) -> None:
        self._generate(self.pipe, self.prompts[:1], self.seeds[0], self.num_steps)

    def _times(self, steps: int, rounds: int | None = None) -> list[float]:
        """Seconds of single pictures; in front of several, some that nobody times."""
        if not self.rounds:
            return [math.nan]
        gc.collect()  # what earlier methods have left is not collected while this is timed
        found, warm = list[float](), WARM if rounds is None and self._compiles else 0
        for number in range(warm + (self.rounds if rounds is None else rounds)):
            if len(found) > 1 and sum(found) > self.enough:
                break
            self._wait()
            start = self.clock()
            self._generate(self.timed, self.prompts[:1], self.seeds[0], steps)
            self._wait()
            if number >= warm:
                found.append(self.clock() - start)
        return found

    @property
    def _compiles(self) -> bool:
        """Whether kernels are compiled and graphs recorded when they are first used."""
        return torch.device(self.timed._execution_device).type == "cuda"

    def _wait(self) -> None:
        if self._compiles:
            torch.cuda.synchronize()
