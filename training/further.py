"""Train the video pipeline further on mixed sizes: ``python training/further.py --out runs/long
--start packages/flashomni-assets/src/flashomni_assets/tiny-video --seconds 450``.

One set of weights for 4,352, 17,408 and 32,912 tokens (see ``training.ladder``). A step has one
rung's clips and about ``--budget`` tokens. ``--seconds`` is a limit on the wall time of this
process, imports included; before it, and every minute, ``state.safetensors`` (weights, averages,
moments), ``pipeline/`` (diffusers format, averaged weights, bf16) and ``progress.json`` are
written. Run again with the same ``--out`` to resume, or elsewhere with ``--start`` at a folder with
``pipeline/`` and ``progress.json``: averaged weights, same place in the schedule, new moments.
The data goes on with new scenes each time.
"""

# ruff: noqa: E402 - imports take long and count
from __future__ import annotations

import time

BEGIN = time.monotonic()

import argparse
import copy
import json
import math
import os
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from diffusers import DiffusionPipeline

from training import attention, flow, ladder, tiny_models
from training.data import Renderer
from training.pool import Captions, ClipPool
from training.state import load_state, replace_folder, save_state

KIND = tiny_models.VIDEO
TRAINED = ("transformer", "text_encoder", "text_encoder_2")
RATE, WARM, DECAY, KEEP = 3e-4, 100, 0.5, 0.998


def elapsed() -> float:
    return time.monotonic() - BEGIN


def say(text: str) -> None:
    print(f"{elapsed():6.1f} s  {text}", flush=True)


class Run:
    """Models, averages, optimiser and place in the schedule."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.out, self.device = args, Path(args.out), args.device
        self.out.mkdir(parents=True, exist_ok=True)
        self.step, self.before, self.total = 0, 0.0, args.total
        self.first = 0  # the step at which moments began: they need a warm-up
        self.spent: dict[str, float] = {}  # estimated seconds of this phase, by rung
        self.stage = -1
        resumed = (self.out / "state.safetensors").exists()
        state = load_state(self.out / "state.safetensors", self.device) if resumed else None
        folder = self.out / "pipeline" if state else Path(args.start)
        if not state and (folder / "progress.json").exists():
            self._place(json.loads((folder / "progress.json").read_text()))
            self.first = self.step
            folder = folder / "pipeline"
        saved = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
        self.pipe = saved.to(self.device)
        for part in tiny_models.modules(self.pipe).values():
            part.float().eval().requires_grad_(False)
        self.average = copy.deepcopy({n: getattr(self.pipe, n) for n in TRAINED})
        for name in TRAINED:
            getattr(self.pipe, name).requires_grad_(True)
        self.live = [p for n in TRAINED for p in getattr(self.pipe, n).parameters()]
        self.mean = [p for n in TRAINED for p in self.average[n].parameters()]
        self.optimiser = torch.optim.AdamW(
            self.live, lr=RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=self.device == "cuda"
        )
        if state:
            self._place(state["place"])
            for name in TRAINED:
                getattr(self.pipe, name).load_state_dict(state["live"][name])
                self.average[name].load_state_dict(state["average"][name])
            self.optimiser.load_state_dict(state["optimiser"])
        flow.float_residual(self.pipe.transformer)
        self.processor = attention.install(self.pipe.transformer, attention.Unpadded())
        rope = self.pipe.transformer.rope
        self.ropes = {s: flow.StageRope(rope, s) for s in (1, 2, 4, 8)}

    def _place(self, place: dict) -> None:
        self.step, self.before = place["step"], place["seconds"]
        self.stage, self.spent, self.first = place["stage"], place["spent"], place["first"]

    def place(self, seconds: float) -> dict:
        """Where in the schedule this run is, ``seconds`` of training after its beginning."""
        return {
            "step": self.step,
            "first": self.first,
            "seconds": seconds,
            "stage": self.stage,
            "spent": self.spent,
        }

    def save(self, seconds: float) -> None:
        """Everything a later run needs; each file and folder appears whole or not at all."""
        place = self.place(seconds)
        state = {
            "place": place,
            "optimiser": self.optimiser.state_dict(),
            "live": {n: getattr(self.pipe, n).state_dict() for n in TRAINED},
            "average": {n: self.average[n].state_dict() for n in TRAINED},
        }
        fresh = tiny_models.build(KIND)
        for name, part in tiny_models.modules(fresh).items():
            part.load_state_dict((self.average.get(name) or self.pipe.vae).state_dict())
        fresh.vae.register_to_config(scaling_factor=self.pipe.vae.config.scaling_factor)
        prompts = tiny_models.heldout_prompts(KIND, 8)
        replace_folder(
            self.out / "pipeline", lambda new: tiny_models.save(fresh, new, KIND, prompts)
        )
        (self.out / "progress.json").write_text(json.dumps(place))
        save_state(state, self.out / "state.safetensors")

    def rate(self, progress: float) -> float:
        warm = min(1.0, (self.step - self.first + 1) / WARM)
        fade = min(1.0, max(0.0, (1 - progress) / DECAY))
        return self.args.rate * warm * (0.03 + 0.97 * 0.5 * (1 - math.cos(math.pi * fade)))

    def update(self, rung: ladder.Rung, pool: ClipPool, progress: float) -> torch.Tensor:
        """One optimiser step; returns its loss, not a number where the step was skipped."""
        self.pipe.transformer.rope = self.ropes[rung.stride]
        latents, tokens = pool.batch(rung.batch(self.args.budget))
        level = flow.spread_levels(len(latents), latents.device)
        with torch.autocast(self.device, torch.bfloat16):
            loss = flow.flow_loss(self.pipe, KIND, latents, tokens, rung.shift, level)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.param_groups[0]["lr"] = self.rate(progress)
        finite = torch.nn.utils.clip_grad_norm_(self.live, 1.0).isfinite()
        if finite:  # a bad batch must not reach the weights
            self.optimiser.step()
        keep = min(KEEP, (1 + self.step) / (20 + self.step))
        torch._foreach_lerp_(self.mean, self.live, 1 - keep)
        self.step += 1
        self.spent[rung.name] = (
            self.spent.get(rung.name, 0.0) + rung.batch(self.args.budget) * rung.seconds()
        )
        return loss.detach() if finite else torch.full_like(loss.detach(), math.nan)


def kernels(rungs: set[ladder.Rung], budget: int) -> dict[str, object]:
    """The attention kernel of each rung, measured here."""
    found = {}
    for rung in sorted(rungs, key=lambda r: r.tokens):
        backend, times = attention.fastest(
            rung.batch(budget), rung.tokens + ladder.TEXT, tiny_models.HEADS, tiny_models.HEAD_DIM
        )
        if rung.every == 1 and "flash" in times:
            backend = attention.SDPBackend.FLASH_ATTENTION  # nothing to build for a new length
        found[rung.name] = backend
        listed = ", ".join(f"{name} {ms:.1f} ms" for name, ms in times.items())
        say(f"attention at {rung.name}: {listed}; takes {backend.name if backend else 'default'}")
    return found


def train(run: Run) -> None:
    args, device = run.args, run.device
    phases = ladder.TOY if args.toy else ladder.PHASES
    chunk, capacity = (32, 8) if args.toy else (512, 1024)
    captions = Captions(run.pipe, KIND, device, args.workers, run.step + 1, chunk)
    renderer = Renderer(compiled=False)
    rungs = {rung for _, shares in phases for rung in shares}
    for rung in rungs:
        captions.source(rung)
    backends = kernels(rungs, args.budget) if device == "cuda" else {}
    pools: dict[str, ClipPool] = {}
    mark = elapsed()
    run.save(run.before)
    reserve, saved = 2 * (elapsed() - mark) + args.margin, elapsed()
    say(f"from step {run.step}, {run.before:.0f} s trained; saving takes {saved - mark:.1f} s")
    begin = elapsed()
    if args.finish:
        run.total = run.before + max(1.0, args.seconds - reserve - begin)
    losses: dict[str, list[torch.Tensor]] = defaultdict(list)
    counts: dict[str, int] = defaultdict(int)
    rendering, shown, shown_step, skipped = 0.0, begin, run.step, 0
    while (now := elapsed()) < args.seconds - reserve and run.step < args.steps:
        seconds = run.before + now - begin
        progress = seconds / run.total
        if progress >= 1:
            break
        stage, shares = ladder.phase(progress, phases)
        if stage != run.stage:
            run.stage, run.spent = stage, {}
        names = {rung.name for rung in shares}
        pools = {name: pool for name, pool in pools.items() if name in names}
        rung = ladder.choose(shares, run.spent)
        if rung.name not in pools:
            pools[rung.name] = ClipPool(
                captions.source(rung), renderer, run.pipe.vae, rung, capacity
            )
            torch.cuda.synchronize() if device == "cuda" else None
            took = elapsed() - now
            rendering += took
            say(f"{pools[rung.name].size} clips of {rung.name} drawn and encoded in {took:.1f} s")
            continue  # it may be late now
        run.processor.backend = backends.get(rung.name)
        try:
            losses[rung.name].append(run.update(rung, pools[rung.name], progress))
        except torch.OutOfMemoryError:
            args.budget = round(0.7 * args.budget)
            torch.cuda.empty_cache()
            say(f"out of memory at {rung.name}: {args.budget} tokens a step from here")
            continue
        except RuntimeError as error:
            if run.processor.backend != attention.SDPBackend.CUDNN_ATTENTION:
                raise
            backends[rung.name] = attention.SDPBackend.FLASH_ATTENTION
            say(f"cuDNN fails at {rung.name}, flash attention from here: {error}")
            continue
        counts[rung.name] += 1
        now = elapsed()
        if now - shown >= args.every:
            parts = []
            for name, values in losses.items():
                values = torch.stack(values)
                skipped += int(values.isnan().sum())
                parts.append(f"{name} {values.nanmean().item():.4f} ({len(values)})")
            pace = (run.step - shown_step) / (elapsed() - shown)
            memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
            say(
                f"step {run.step} at {100 * progress:.0f} %: {', '.join(parts)}; "
                f"{pace:.2f} steps/s, rate {run.rate(progress):.1e}, {memory:.0f} GiB"
            )
            losses.clear()
            shown, shown_step = elapsed(), run.step
            if skipped > 20:
                raise FloatingPointError(f"{skipped} gradients were not finite")
        if now - saved > args.save_every:
            run.save(run.before + now - begin)
            saved = elapsed()
    run.save(run.before + elapsed() - begin)
    table = ", ".join(f"{name} {count}" for name, count in counts.items())
    say(
        f"done at step {run.step}, {run.before + elapsed() - begin:.0f} s trained in all; "
        f"steps: {table}; first clips took {rendering:.1f} s; {skipped} steps skipped"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, help="folder of the run")
    parser.add_argument("--start", help="a saved pipeline, or the folder of another run")
    parser.add_argument("--seconds", type=float, required=True, help="wall time of this process")
    parser.add_argument("--total", type=float, default=840.0, help="seconds of the schedule")
    parser.add_argument("--finish", action="store_true", help="the schedule ends with this process")
    parser.add_argument("--steps", type=int, default=1 << 40, help="stop at this step")
    parser.add_argument("--rate", type=float, default=RATE, help="largest learning rate")
    parser.add_argument("--budget", type=int, default=ladder.BUDGET, help="tokens of a step")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between lines")
    parser.add_argument(
        "--save-every", type=float, default=60.0, help="seconds between checkpoints"
    )
    parser.add_argument("--margin", type=float, default=3.0, help="seconds kept for the last step")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=4, help="processes for each caption source")
    parser.add_argument("--toy", action="store_true", help="tiny clips: a rehearsal of the code")
    args = parser.parse_args()
    if not args.start and not (Path(args.out) / "state.safetensors").exists():
        parser.error("--start is needed: there is nothing to resume in --out")
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = True, 4
    run = Run(args)
    torch.manual_seed(run.step)
    train(run)


if __name__ == "__main__":
    main()
