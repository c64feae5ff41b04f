"""One pipeline of diffusers' tests, whole: does it stay the stock pipeline where it must?

The tests' small components, Hub parts replaced (``stand_ins``), six steps. ``lossless`` must give
the stock pipeline's output for two prompts and two seeds, ``remove()`` its bits; ``fora`` and
``balanced`` must see every step, dispatch some, and stay finite. A LoRA on the transformer must
count as it does in stock.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flashomni
from flashomni.engine import Recipe
from matrix.jobs import words
from matrix.models import attention, residue
from matrix.small import filled

STEPS = 6
LIMIT = 1e-5  # of the largest value of the stock output, in fp32
SECOND = "w5 w7 w11 w13"
PARTS = ("transformer", "transformer_2")
RECIPES = {
    "fora": Recipe.of("fora", interval=3, warmup=0.3, level="layers"),
    "balanced": Recipe.of("balanced", min_steps=0),
}
Test = tuple[Path, str, str]


def cases(tests: Path) -> Iterator[tuple[str, Test]]:
    """Name, and where the test is: the folder, its module, its class. Nothing is imported."""
    root = Path(tests) / "tests" / "pipelines"
    if not root.is_dir():
        raise ValueError(f"tests must hold tests/pipelines, got {tests}")
    for path in sorted(root.rglob("test_*.py")):
        text = path.read_text("utf-8")
        if not re.search(r"""["']?transformer["']?\s*[=:]""", text):
            continue
        module = ".".join(path.relative_to(tests).with_suffix("").parts)
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef) and "get_dummy_components" in _defined(node):
                pipeline = _pipeline_class(node)
                if pipeline:
                    yield f"{pipeline}/{node.name}", (Path(tests), module, node.name)


def warm(test: Test) -> None:
    """Import what a test needs, before the process of its check is forked."""
    tests, module, _ = test
    if str(tests) not in sys.path:
        sys.path.insert(0, str(tests))
    with contextlib.suppress(Exception):  # said by the check
        importlib.import_module("peft")
    with contextlib.suppress(Exception):
        importlib.import_module(module)


def _defined(node: ast.ClassDef) -> set[str]:
    return {each.name for each in node.body if isinstance(each, ast.FunctionDef)}


def _pipeline_class(node: ast.ClassDef) -> str:
    for each in node.body:
        named = isinstance(each, ast.Assign) and isinstance(each.value, ast.Name)
        if named and getattr(each.targets[0], "id", "") == "pipeline_class":
            return each.value.id
    return ""


@torch.no_grad()
def check(test: Test, device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The row of one pipeline."""
    from matrix import stand_ins

    stand_ins.put_in_place()
    _, module, name = test
    warm(test)
    found = getattr(importlib.import_module(module), name)
    made = found.__new__(found)
    row: dict[str, Any] = {"class": found.pipeline_class.__name__, "device": device}
    row["dtype"] = str(dtype).removeprefix("torch.")
    pipe = build(made).to(device, dtype)
    models = {part: getattr(pipe, part, None) for part in PARTS}
    models = {part: model for part, model in models.items() if model is not None}
    if not models:
        return {**row, "status": "no transformer", "why": ""}
    row["transformers"] = {part: type(model).__name__ for part, model in models.items()}
    row["scheduler"] = type(pipe.scheduler).__name__
    row.update(traits(pipe))
    found = _Run(made, pipe, list(models.values()), row).all()  # which adds to the row
    return {**row, **found}


def build(made: Any) -> Any:
    """The pipeline with the tests' small components, blocks that matter, and no progress bar."""
    pipe = made.pipeline_class(**made.get_dummy_components())
    pipe.set_progress_bar_config(disable=True)
    for part in PARTS:
        if getattr(pipe, part, None) is not None:
            filled(getattr(pipe, part))
    return pipe


def traits(pipe: Any) -> dict[str, Any]:
    """What such a pipeline can do beside text to picture."""
    name = type(pipe).__name__
    image = any(word in name for word in ("Img2Img", "ImageToVideo", "Inpaint", "Edit", "Kontext"))
    return {
        "image": image or "Video2World" in name or "VideoToVideo" in name,
        "controlnet": "Control" in name,
        "ip_adapter": hasattr(pipe, "load_ip_adapter"),
        "lora": "not offered" if not hasattr(pipe, "load_lora_weights") else "not run",
    }


class _Run:
    """The checks of one pipeline; each gives a part of its row."""

    def __init__(self, made: Any, pipe: Any, models: list, row: dict) -> None:
        self.made, self.pipe, self.models, self.row = made, pipe, models, row
        self.steps: int | None = STEPS  # or what the test has
        self.wrong: list[str] = []
        self.missed: list[str] = []  # steps that were not seen: nothing is cached then

    def all(self) -> dict[str, Any]:
        try:
            self.generate(0, 0)
        except ValueError:  # SANA-Sprint has two steps, no others
            self.steps = None
        calls, steps = self.count()
        prompts = 2 if self.takes_another_prompt() else 1
        runs = list(itertools.product(range(prompts), range(2)))
        stock = [self.generate(prompt, seed) for prompt, seed in runs]
        if not all(x.isfinite().all() for x in stock):
            return {"status": "not run", "why": "the stock output of these weights is not finite"}
        if not torch.equal(stock[0], self.generate(0, 0)):
            return {"status": "not run", "why": "stock itself differs from call to call"}
        clean = [residue(model) for model in self.models]
        scale = max(float(x.abs().max()) for x in stock)
        worst, seen = 0.0, ""
        try:
            with flashomni.accelerate(self.pipe, "lossless") as engine:
                for (prompt, seed), expected in zip(runs, stock, strict=True):
                    error = (self.generate(prompt, seed) - expected).abs().max()
                    worst = max(worst, float(error) / scale)
                    seen = seen or saw(engine.report(), calls, steps)
                report = engine.report()
        except (ValueError, NotImplementedError) as error:
            return {"status": "refused", "why": words(error)}
        self.row.update(tier=report.tier, steps=steps, lossless=float(f"{worst:.1e}"))
        self.row.update(attention(report), blocks=len(report.layers))
        self.expect(worst <= LIMIT, f"lossless is off by {worst:.1e} of the output's size")
        self.missed += [f"lossless {seen}"] if seen else []
        for name, recipe in RECIPES.items():
            self.row[name] = self.cached(name, recipe, stock[0], calls, steps)
        same = torch.equal(self.generate(0, 0), stock[0])
        self.row["removed"] = same and [residue(model) for model in self.models] == clean
        self.expect(self.row["removed"], "remove() leaves something behind")
        if self.row["lora"] == "not run":
            self.row["lora"] = self.lora()
        status = "wrong" if self.wrong else "miscounted" if self.missed else "works"
        return {"status": status, "why": "; ".join([*self.wrong, *self.missed])}

    def takes_another_prompt(self) -> bool:
        """Some take theirs in a form of their own, JSON for instance."""
        try:
            self.generate(1, 0)
        except (ValueError, IndexError):
            return False
        return True

    def expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.wrong.append(otherwise)

    def cached(self, name: str, recipe: Recipe, stock: Tensor, calls: int, steps: int) -> dict:
        """A recipe that caches: steps seen, kinds of layers, how far it is from stock."""
        try:
            with flashomni.accelerate(self.pipe, recipe) as engine:
                got = self.generate(0, 0)
                report = engine.report()
        except (ValueError, NotImplementedError) as error:
            return {"refused": words(error)}
        kinds = sorted({kind for step in report.steps for kind in step["layer_kinds"]})
        seen = saw(report, calls, steps)
        self.expect(bool(got.isfinite().all()), f"{name} is not finite")
        self.missed += [f"{name} {seen}"] if seen else []
        change = float((got - stock).abs().mean() / stock.abs().mean().clamp(min=1e-6))
        return {"change": float(f"{change:.1e}"), "kinds": kinds}

    def count(self) -> tuple[int, int]:
        """Calls of the transformers, and steps of the scheduler, in a stock generation.

        A scheduler that is set back and asked again (Cosmos wants a step in two forms) made one,
        and so did two beside each other (LTX-2 has one for its sound).
        """
        calls, steps = [0], dict[int, set[int]]()

        def called(*_: Any) -> None:
            calls[0] += 1

        kind = type(self.pipe.scheduler)  # copies of the scheduler count as well
        step = kind.step

        def stepped(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            made = step(scheduler, *args, **kwargs)
            mine = steps.setdefault(id(scheduler), set())
            at = getattr(scheduler, "step_index", None)
            mine.add(len(mine) if at is None else at)
            return made

        handles = [model.register_forward_pre_hook(called) for model in self.models]
        kind.step = stepped
        try:
            self.generate(0, 0)
        finally:
            kind.step = step
            for handle in handles:
                handle.remove()
        return calls[0], max(map(len, steps.values()), default=0)

    def generate(self, prompt: int, seed: int) -> Tensor:
        """One generation; what draws outside its generator is seeded too."""
        torch.manual_seed(seed)
        try:
            given = self.made.get_dummy_inputs()
        except TypeError:
            given = self.made.get_dummy_inputs(self.row["device"])
        if "num_inference_steps" in given:
            given["num_inference_steps"] = self.steps or given["num_inference_steps"]
        if "generator" in given:
            given["generator"] = torch.Generator().manual_seed(seed)
        if prompt and isinstance(given.get("prompt"), str):
            given["prompt"] = SECOND
        elif prompt and isinstance(given.get("prompt"), list):
            given["prompt"] = [SECOND] * len(given["prompt"])
        torch.manual_seed(seed)
        return torch.cat([x.flatten().float().cpu() for x in tensors(self.pipe(**given)[0])])

    def lora(self) -> str:
        """A LoRA with random weights on the first transformer: as in stock, and not without it."""
        try:
            from peft import LoraConfig
        except ImportError:
            return "not run: peft is not installed"
        model = self.models[0]
        names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        targets = sorted(names & {"to_q", "to_k", "to_v", "q_proj", "to_qkv_mlp_proj", "q", "v"})
        if not targets or not hasattr(model, "add_adapter"):
            return "not run: no projections of a known name"
        plain = self.generate(0, 0)
        torch.manual_seed(0)
        model.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
        stock = self.generate(0, 0)
        if torch.equal(stock, plain):
            return "not run: it changes nothing in stock"
        with flashomni.accelerate(self.pipe, "lossless"):
            got = self.generate(0, 0)
        error = float((got - stock).abs().max() / stock.abs().max())
        self.expect(error <= LIMIT, f"with a LoRA lossless is off by {error:.1e}")
        return "exact" if error <= LIMIT else "wrong"


def saw(report: Any, calls: int, steps: int) -> str:
    """What is wrong about the steps that were seen, if anything."""
    if len(report.steps) != calls:
        return f"saw {len(report.steps)} of {calls} calls"
    numbers = {(step.get("transformer"), step["step"]) for step in report.steps}
    return "" if len(numbers) == steps else f"saw {len(numbers)} steps, the scheduler made {steps}"


def tensors(found: Any) -> list[Tensor]:
    """Pictures, sounds or videos in whatever form, as tensors."""
    if isinstance(found, Tensor):
        return [found]
    if isinstance(found, (list, tuple)):
        return [tensor for part in found for tensor in tensors(part)]
    import numpy

    return [torch.from_numpy(numpy.array(found))]
