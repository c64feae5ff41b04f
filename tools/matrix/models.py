"""One transformer class: is it exact where it must be, and is that seen where it is not?

Inputs that are the same in every step make every cached value exact, so each step must equal the
stock model, whatever is cached; gates that are initialised to zero are filled, since blocks that
change nothing prove nothing. The guard is the same generation with cached values off by 1e-3: it
must be seen. ``lossless`` caches nothing, and runs two prompts and two seeds over timesteps that
vary. The error is that of everything the model returns, as a share of its largest value.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import flashomni
from flashomni import dispatch
from flashomni.engine import Recipe
from flashomni.lab.versions import device_name
from flashomni.policies import make_policy
from matrix.definition import error
from matrix.jobs import words

ATOL, RTOL = 2e-5, 1e-4  # of the stock model in fp32
STEPS = 8
TILES = "topk, tiles"
LIMIT = 1e-5  # of a share of the output's size
OFF = 1e-3
COARSE = 2.0**-9  # half a step of bfloat16, as a share of the output's size
LATENTS = (
    "hidden_states", "x", "latents", "sample", "audio_hidden_states", "decoder_input_tokens",
    "inputs_embeds", "bb_ca", "local_latents",
)  # fmt: skip
TEXT = ("encoder_hidden_states", "cap_feats", "context", "prompt_embeds", "text_embeds")
TIMES = ("timestep", "timesteps", "t", "sigma", "audio_timestep", "decoder_noise_time")


def recipes() -> dict[str, Recipe]:
    """What runs on inputs that stay the same."""
    tiles = make_policy("topk", q_density=0.5, kv_density=1.0)
    sparse = {"interval": 3, "warmup": 0.0, "block_m": 16, "block_n": 16}
    return {
        "fora": Recipe.of("fora", interval=3, warmup=0.3, level="layers"),
        "balanced": Recipe.of("balanced", min_steps=0),
        TILES: Recipe.of(tiles, **sparse),
    }


@torch.no_grad()
def check(make: Callable[[], Any], device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict:
    """The row of one model."""
    model, inputs = make()
    row: dict[str, Any] = {"class": type(model).__name__, "device": device}
    if device != "cpu":
        row["on"] = device_name(torch.device(device))
    exact = output(model, inputs)
    if not torch.equal(exact, output(model, inputs)):
        return {**row, "status": "not run", "why": "stock itself differs from call to call"}
    if device != "cpu" or dtype != torch.float32:
        model, inputs = lowered(model, inputs, device, dtype)
    row["dtype"] = str(dtype).removeprefix("torch.")
    run = _Run(model, inputs, exact, row)
    try:
        run.lossless()
    except (ValueError, NotImplementedError) as error:
        return {**row, "status": "refused", "why": words(error)}
    for name, recipe in recipes().items():
        run.constant(name, recipe)
    if not run.low:  # which is coarser than what these look for
        run.definition(recipes()["fora"])
        run.guard("guard", recipes()["fora"], 3, shift_layers)
        run.guard("tile guard", recipes()[TILES], 2, shift_tiles)
    run.removed()
    wrong = run.wrong
    return {**row, "status": "wrong" if wrong else "works", "why": "; ".join(wrong)}


class _Run:
    """The checks of one model; ``row`` collects what they find."""

    def __init__(self, model: nn.Module, inputs: dict, exact: Tensor, row: dict) -> None:
        self.model, self.inputs, self.row, self.wrong = model, inputs, row, []
        self.clean = residue(model)
        self.stock = output(model, inputs)
        self.scale = float(exact.abs().max())
        low = float((self.stock.float().cpu() - exact).abs().max())
        self.low = 0.0 if row["dtype"] == "float32" and row["device"] == "cpu" else 2 * low + 1e-2
        if coarse_attention(model, inputs) and not self.low:
            row["rounds"] = "its attention is in bfloat16, which is coarser than what is shifted"

    def beyond(self, got: Tensor, stock: Tensor, more: float = 0.0) -> tuple[float, float]:
        """The largest difference as a share of the output's size, and of what is allowed."""
        error = (got - stock).abs().float()
        if not got.isfinite().all() or not stock.isfinite().all():
            return float("inf"), float("inf")
        allowed = ATOL + RTOL * stock.abs().float() + self.low + more
        return float(error.max()) / self.scale, float((error / allowed).max())

    def lossless(self) -> None:
        """Two prompts, two seeds, each step with another time and other latents."""
        cases = [
            [varied(self.inputs, prompt, seed, step) for step in range(3)]
            for prompt, seed in itertools.product(range(2), range(2))
        ]
        stock = [[output(self.model, given) for given in steps] for steps in cases]
        worst = (0.0, 0.0)
        with (
            kernels() as self.row["kernels"],
            flashomni.accelerate(self.model, "lossless") as engine,
        ):
            for steps, expected in zip(cases, stock, strict=True):
                for step, given in enumerate(steps):
                    engine.step(step, len(steps))
                    got = output(self.model, given)
                    worst = max(worst, self.beyond(got, expected[step]), key=lambda w: w[1])
            self.describe(engine.report())
        self.keep("lossless", *worst)

    def describe(self, report: Any) -> None:
        """Tier, blocks, and whose attention ran."""
        self.row["tier"] = report.tier
        self.row["blocks"] = dict(Counter(name.rpartition(".")[0] for name in report.layers))
        self.row.update(attention(report))

    def constant(self, name: str, recipe: Recipe) -> None:
        """The same inputs in every step: every step is the stock model's."""
        worst, kinds = (0.0, 0.0), set()
        more = COARSE * self.scale if name == TILES and "rounds" in self.row else 0.0
        try:
            with flashomni.accelerate(self.model, recipe) as engine:
                for step in range(STEPS):
                    engine.step(step, STEPS + 1)
                    got = output(self.model, self.inputs)
                    worst = max(worst, self.beyond(got, self.stock, more), key=lambda w: w[1])
                for step in engine.report().steps:
                    kinds |= set(step["layer_kinds"])
        except (ValueError, NotImplementedError) as error:
            self.row[name] = {"refused": words(error)}
            return
        self.keep(name, *worst, kinds=sorted(kinds))

    def definition(self, recipe: Recipe) -> None:
        """Whole layers on inputs that vary, against what is written out block by block."""
        given = [varied(self.inputs, 0, 0, step) for step in range(STEPS)]
        got, lists = [], set[str]()
        with flashomni.accelerate(self.model, recipe) as engine:
            for step, inputs in enumerate(given):
                engine.step(step, STEPS)
                got.append(output(self.model, inputs))
            report = engine.report()
        cached = ["bypass" in step["layer_kinds"] for step in report.steps]
        for step in report.steps:
            paths = zip(report.layers, step["layer_kinds"], strict=True)
            lists |= {name.rpartition(".")[0] for name, kind in paths if kind == "bypass"}
        if not lists:
            self.row["definition"] = "nothing is cached"
            return
        try:
            off = error(self.model, given, sorted(lists), cached, got, output)
        except LookupError as none:
            self.row["definition"] = str(none)
            return
        self.row["definition"] = {"error": float(f"{off:.1e}")}
        if not off <= LIMIT:
            self.wrong.append(f"whole layers are off by {off:.1e} from their definition")

    def guard(self, name: str, recipe: Recipe, at: int, shift: Callable[[Any], int]) -> None:
        """Values that are kept off by 1e-3 before a step that takes some: the check must see it."""
        with flashomni.accelerate(self.model, recipe) as engine:
            for step in range(at):
                engine.step(step, STEPS)
                output(self.model, self.inputs)
            shifted = shift(engine)
            engine.step(at, STEPS)
            _, seen = self.beyond(output(self.model, self.inputs), self.stock)
            last = engine.report().steps[-1]
        taken = "bypass" in last["layer_kinds"] or min(last["q_density"], default=1.0) < 1
        if not shifted or not taken:
            self.row[name] = "nothing is cached"
            return
        if "rounds" in self.row and shift is shift_tiles:
            self.row[name] = self.row["rounds"]
            return
        self.row[name] = round(min(seen, 1e6), 1)
        if seen <= 1:
            self.wrong.append(f"{name}: a cached value off by 1e-3 is not seen")

    def removed(self) -> None:
        """The stock model again, bit for bit, and nothing left on its modules."""
        same = torch.equal(output(self.model, self.inputs), self.stock)
        self.row["removed"] = same and residue(self.model) == self.clean
        if not self.row["removed"]:
            self.wrong.append("remove() leaves something behind")

    def keep(self, name: str, error: float, beyond: float, **more: Any) -> None:
        self.row[name] = {"error": float(f"{error:.1e}"), **more}
        if not beyond <= 1:
            self.wrong.append(f"{name} is off by {error:.1e} of the output's size")


def coarse_attention(model: nn.Module, inputs: dict) -> bool:
    """Whether a model of fp32 attends in less: then tiles are exact to that alone."""
    dtypes: set[torch.dtype] = set()

    class Watch(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
        ) -> Any:
            if func is torch.nn.functional.scaled_dot_product_attention:
                dtypes.add((args[0] if args else kwargs["query"]).dtype)
            return func(*args, **(kwargs or {}))

    with Watch():
        output(model, inputs)
    weights = {x.dtype for x in model.parameters() if x.is_floating_point()}
    return weights == {torch.float32} and torch.bfloat16 in dtypes


def shift_layers(engine: Any) -> int:
    """Move every value that is kept of whole layers."""
    return sum(
        off(history.terms()[0][..., 0])  # one channel: a norm would hide a shift of all
        for branch in engine._runtime.last.branches.values()
        for group in branch.groups
        for span in group.spans._current
        for history in span.histories
        if history is not None
    )


def shift_tiles(engine: Any) -> int:
    """Move every value that is kept of attention, in front of its projection or behind it."""
    count = 0
    for branch in engine._runtime.last.branches.values():
        for layer in branch.layers:
            if layer.history is not None:
                count += off(layer.history.terms()[0])
            if layer.bias_terms is not None:
                count += off(layer.bias_terms.get()[0])
    return count


def off(kept: Tensor) -> int:
    """1e-3 more than it was; where values are large, 1e-3 of their size."""
    kept.add_(OFF * max(1.0, float(kept.float().square().mean().sqrt())))
    return 1


@contextmanager
def kernels() -> Iterator[dict[str, int]]:
    """Count which backends of attention run, in this process alone."""
    counts: Counter[str] = Counter()
    found: dict[str, int] = {}
    select = dispatch.select

    def counted(op: str, call: Any, name: str | None = None) -> Any:
        chosen = select(op, call, name)
        counts[chosen.name] += op == "attention"
        return chosen

    dispatch.select = counted  # type: ignore[assignment]
    try:
        yield found
    finally:
        dispatch.select = select
        found.update(+counts)


def attention(report: Any) -> dict[str, Any]:
    """How many blocks have their attention on our op, and why others have not."""
    if report.tier == "adapter":  # which attends on our op in each of its blocks
        return {"ours": len(report.layers), "own": [], "uncached": []}
    ours, own, uncached = 0, [], []
    for note in report.notes:
        if found := re.search(r"attention of (\d+) of \d+ blocks on FlashOmni", note):
            ours += int(found[1])
        elif "the model's own attention" in note:
            own.append(note)
        elif "in every step, because" in note or note.startswith("without the adapter"):
            uncached.append(note)
    return {"ours": ours, "own": own, "uncached": uncached}


def output(model: nn.Module, inputs: dict) -> Tensor:
    """Every tensor that a model returns, in one."""
    plain = {"return_dict": False} if "return_dict" in signature(model.forward).parameters else {}
    return torch.cat([x.flatten() for x in _tensors(model(**inputs, **plain))])


def _tensors(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    parts = found if isinstance(found, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def varied(inputs: dict, prompt: int, seed: int, step: int) -> dict:
    """The arguments of a step of a generation: other text, other latents, another time."""
    given = {}
    for name, value in inputs.items():
        if name in LATENTS:
            given[name] = _turned(value, 0.9 * seed + 0.3 * step)
        elif name in TEXT:
            given[name] = _turned(value, 0.8 * prompt)
        elif name in TIMES and isinstance(value, Tensor):
            given[name] = (value * (1 - 0.07 * step)).to(value.dtype)
        else:
            given[name] = value
    return given


def _turned(value: Any, angle: float) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_turned(part, angle) for part in value)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    turn = torch.tensor(angle)
    return value * turn.cos() + value.flip(-1) * turn.sin()


def lowered(
    model: nn.Module, inputs: dict, device: str, dtype: torch.dtype
) -> tuple[nn.Module, dict]:
    """The model elsewhere, and such arguments as it takes there: all but positions and times, as
    pipelines give them, or all, or none where it lowers them itself.

    Where it takes none of them, modules that diffusers loads in fp32 stay so.

    Raises:
        RuntimeError: stock takes none of these.
    """
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    model = model.to(device, dtype)
    errors = []
    for whole in (True, False):
        if not whole:
            stay = (m for n, m in model.named_modules() if {*kept} & {*n.split(".")})
            for module in stay:
                module.float()
        for dims in (3, 0, 99):
            given = moved(inputs, device, dtype, dims)
            try:
                output(model, given)
                return model, given
            except RuntimeError as error:
                errors.append(error)
    raise errors[0]


def moved(value: Any, device: str, dtype: torch.dtype, dims: int = 3) -> Any:
    """Arguments on a device, floats of that many dims lowered: not positions and times."""
    if isinstance(value, Tensor):
        lower = value.dtype == torch.float32 and value.ndim >= dims
        return value.to(device, dtype if lower else None)
    if isinstance(value, dict):
        return {
            key: moved(part, device, dtype, min(2, dims) if key.startswith("pooled") else dims)
            for key, part in value.items()
        }
    if isinstance(value, (list, tuple)):
        return type(value)(moved(part, device, dtype, dims) for part in value)
    return value


def residue(model: nn.Module) -> list[str]:
    """Modules on which something could be left behind."""
    return [
        name
        for name, module in model.named_modules()
        if "forward" in module.__dict__
        or hasattr(module, "_diffusers_hook")
        or module._forward_hooks
        or module._forward_pre_hooks
    ]
