"""Train tiny-wan: ``torchrun --nproc-per-node 4 training/wan.py --out runs/wan --seconds 440``, or
``python training/wan.py`` with the same arguments on one card.

From nothing to 4,352, 17,408 and 32,912 tokens in one set of weights (``ladder.WAN_PHASES``). A
step has one rung's clips, about ``--budget`` tokens on each rank, and the ranks' mean gradient.
``--seconds`` is a limit on the wall time of this process, imports included; before it, and every
minute, rank 0 writes ``state.safetensors`` (weights, averages, moments), ``pipeline/`` (diffusers
format, averaged weights, bf16) and ``progress.json``. Run again with the same ``--out`` to resume,
on any number of ranks; the schedule ends after ``--total`` seconds of training, or with this
process (``--finish``). The autoencoder is tiny-video's.
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
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from training import attention, flow, ladder, tiny_models, wan_model
from training.data import Renderer
from training.pool import Captions, ClipPool
from training.ranks import Ranks
from training.state import load_state, replace_folder, save_state

TRAINED = ("transformer", "text_encoder")
VIDEO = Path(__file__).parents[1] / "packages/flashomni-assets/src/flashomni_assets/tiny-video"
BUDGET = 66_000  # tokens of a step on each rank: two whole clips of 352 x 352
RATE, WARM, DECAY, KEEP = 1.5e-3, 200, 0.6, 0.999
STOP = -1  # in the place of a rung's number


def elapsed() -> float:
    return time.monotonic() - BEGIN


class Run:
    """Models, averages, optimiser and place in the schedule; the same on every rank."""

    def __init__(self, args: argparse.Namespace, ranks: Ranks):
        self.args, self.ranks, self.device = args, ranks, ranks.device
        self.out = Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.step, self.before = 0, 0.0
        self.stage = -1
        self.spent: dict[str, float] = {}  # seconds of this phase, by rung
        self.pipe = wan_model.build(args.autoencoder).to(self.device)
        for part in tiny_models.modules(self.pipe).values():
            part.requires_grad_(False)
        self.average = copy.deepcopy({n: getattr(self.pipe, n) for n in TRAINED})
        for name in TRAINED:
            getattr(self.pipe, name).requires_grad_(True)
        self.live = [p for n in TRAINED for p in getattr(self.pipe, n).parameters()]
        self.mean = [p for n in TRAINED for p in self.average[n].parameters()]
        self.optimiser = torch.optim.AdamW(
            [
                {"params": [p for p in self.live if p.ndim > 1], "weight_decay": 0.01},
                {"params": [p for p in self.live if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=args.rate,
            betas=(0.9, 0.98),
            fused="cuda" in self.device,
        )
        if (self.out / "state.safetensors").exists():
            self._resume(load_state(self.out / "state.safetensors", self.device))
        self.ranks.copy_(self.live)
        rope = self.pipe.transformer.rope
        self.ropes = {s: flow.StageRope(rope, s, dim=1) for s in (1, 2, 4, 8)}
        self.network = wan_model.Network(self.pipe.transformer, args.compile)
        blank = tiny_models.tokenize(self.pipe, [""])
        self.blank = {name: ids.to(self.device) for name, ids in blank.items()}

    def _resume(self, state: dict) -> None:
        place = state["place"]
        self.step, self.before = place["step"], place["seconds"]
        self.stage, self.spent = place["stage"], place["spent"]
        for name in TRAINED:
            getattr(self.pipe, name).load_state_dict(state["live"][name])
            self.average[name].load_state_dict(state["average"][name])
        self.optimiser.load_state_dict(state["optimiser"])

    def say(self, text: str) -> None:
        if self.ranks.first:
            print(f"{elapsed():6.1f} s  {text}", flush=True)

    def save(self, seconds: float) -> None:
        """Everything a later run needs; each file and folder appears whole or not at all."""
        if not self.ranks.first:
            return
        place = {
            "step": self.step,
            "seconds": seconds,
            "stage": self.stage,
            "spent": self.spent,
            "ranks": self.ranks.size,
        }
        state = {
            "place": place,
            "optimiser": self.optimiser.state_dict(),
            "live": {n: getattr(self.pipe, n).state_dict() for n in TRAINED},
            "average": {n: self.average[n].state_dict() for n in TRAINED},
        }
        with torch.random.fork_rng(devices=[]):
            fresh = wan_model.build(self.args.autoencoder)
        for name in TRAINED:
            getattr(fresh, name).load_state_dict(self.average[name].state_dict())
        prompts = tiny_models.heldout_prompts(wan_model.KIND, 8)
        replace_folder(
            self.out / "pipeline",
            lambda new: tiny_models.save(fresh, new, wan_model.KIND, prompts),
        )
        (self.out / "progress.json").write_text(json.dumps(place))
        save_state(state, self.out / "state.safetensors")

    def rate(self, progress: float) -> float:
        warm = min(1.0, (self.step + 1) / WARM)
        fade = min(1.0, max(0.0, (1 - progress) / DECAY))
        return self.args.rate * warm * (0.01 + 0.99 * 0.5 * (1 - math.cos(math.pi * fade)))

    def update(self, rung: ladder.Rung, pool: ClipPool, progress: float) -> torch.Tensor:
        """One optimiser step; returns this rank's loss, not a number where it was skipped."""
        self.network.rope = self.ropes[rung.stride]
        latents, tokens = pool.batch(rung.batch(self.args.budget))
        lost = torch.rand(len(latents), 1, device=latents.device) < self.args.blank
        tokens = {name: torch.where(lost, self.blank[name], ids) for name, ids in tokens.items()}
        level = flow.spread_levels(len(latents), latents.device)
        kind = "cuda" if "cuda" in self.device else "cpu"
        with torch.autocast(kind, torch.bfloat16) if self.args.bf16 else nullcontext():
            loss = flow.flow_loss(
                self.pipe,
                wan_model.KIND,
                latents,
                tokens,
                rung.shift,
                level,
                self.network.predict,
            )
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        used = [p for p in self.live if p.grad is not None]
        self.ranks.mean_([p.grad for p in used])
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate(progress)
        finite = torch.nn.utils.clip_grad_norm_(used, 1.0).isfinite()
        if finite:  # a bad batch must not reach the weights
            self.optimiser.step()
        keep = min(KEEP, (1 + self.step) / (20 + self.step))
        torch._foreach_lerp_(self.mean, self.live, 1 - keep)
        self.step += 1
        return loss.detach() if finite else torch.full_like(loss.detach(), math.nan)


def kernels(run: Run, rungs: list[ladder.Rung]) -> dict[str, object]:
    """The attention kernel of each rung, measured on this card."""
    found = {}
    for rung in rungs:
        backend, times = attention.fastest(
            rung.batch(run.args.budget), rung.tokens, wan_model.HEADS, wan_model.HEAD_DIM
        )
        found[rung.name] = backend
        listed = ", ".join(f"{name} {ms:.1f} ms" for name, ms in times.items())
        run.say(f"attention at {rung.name}: {listed}")
    return found


class Clock:
    """Where rank 0 stands in the schedule, and what it decides from that."""

    def __init__(self, run: Run, rungs: list[ladder.Rung], phases, begin: float, end: float):
        self.run, self.rungs, self.phases, self.begin, self.end = run, rungs, phases, begin, end
        self.total = run.before + end - begin if run.args.finish else run.args.total
        self.saved = begin

    def seconds(self) -> float:
        """Of training, earlier processes' included."""
        return self.run.before + elapsed() - self.begin

    def next(self) -> tuple[int, float, bool]:
        """Number of the next rung or STOP, progress, and whether to save before it."""
        run, progress = self.run, self.seconds() / self.total
        if elapsed() >= self.end or progress >= 1 or run.step >= run.args.steps:
            return STOP, progress, False
        stage, shares = ladder.phase(progress, self.phases)
        if stage != run.stage:
            run.stage, run.spent = stage, {}
        save = elapsed() - self.saved > run.args.save_every
        self.saved = elapsed() if save else self.saved
        return self.rungs.index(ladder.choose(shares, run.spent)), progress, save


def train(run: Run) -> None:
    args, ranks = run.args, run.ranks
    phases = ladder.toy(ladder.WAN_PHASES) if args.toy else ladder.WAN_PHASES
    chunk, capacity = (32, 8) if args.toy else (512, 4096)
    seed = 1 + run.step + 100_003 * ranks.rank
    captions = Captions(run.pipe, wan_model.KIND, run.device, args.workers, seed, chunk)
    renderer = Renderer(compiled=False)
    rungs = list(dict.fromkeys(rung for _, shares in phases for rung in shares))
    for rung in rungs:
        captions.source(rung)
    backends = kernels(run, rungs) if "cuda" in run.device else {}
    mark = elapsed()
    run.save(run.before)
    reserve = 2 * (elapsed() - mark) + args.margin
    ranks.agree([0.0])
    begin = elapsed()
    clock = Clock(run, rungs, phases, begin, args.seconds - reserve)
    run.say(f"from step {run.step}, {run.before:.0f} s trained, {ranks.size} ranks")
    pools: dict[str, ClipPool] = {}
    losses: dict[str, list[torch.Tensor]] = defaultdict(list)
    counts: dict[str, int] = defaultdict(int)
    shown, shown_step, skipped = begin, run.step, 0
    while True:
        number, progress, save = ranks.agree(clock.next())
        if save:
            run.save(clock.seconds())
        if number == STOP:
            break
        rung, now = rungs[int(number)], elapsed()
        _, shares = ladder.phase(progress, phases)
        pools = {name: pool for name, pool in pools.items() if name in {r.name for r in shares}}
        new = rung.name not in pools
        if new:
            pools[rung.name] = ClipPool(
                captions.source(rung), renderer, run.pipe.vae, rung, capacity, alike=False
            )
        run.network.backend = backends.get(rung.name)
        losses[rung.name].append(run.update(rung, pools[rung.name], progress))
        counts[rung.name] += 1
        if new:
            run.say(
                f"{pools[rung.name].size} clips of {rung.name}, first step: {elapsed() - now:.1f} s"
            )
        else:  # what is built and drawn once does not count
            run.spent[rung.name] = run.spent.get(rung.name, 0.0) + elapsed() - now
        if run.spent.get(rung.name, 0.0) == 0.0:
            run.spent[rung.name] = 1e-6
        if elapsed() - shown >= args.every:
            parts = []
            for name, values in losses.items():
                stacked = torch.stack(values)
                skipped += int(stacked.isnan().sum())
                parts.append(f"{name} {stacked.nanmean().item():.4f} ({len(values)})")
            pace = (run.step - shown_step) / (elapsed() - shown)
            memory = torch.cuda.max_memory_allocated() / 2**30 if "cuda" in run.device else 0.0
            run.say(
                f"step {run.step} at {100 * progress:.0f} %: {', '.join(parts)}; "
                f"{pace:.2f} steps/s, rate {run.rate(progress):.1e}, {memory:.0f} GiB"
            )
            losses.clear()
            shown, shown_step = elapsed(), run.step
            if skipped > 20:
                raise FloatingPointError(f"{skipped} gradients were not finite")
    run.save(clock.seconds())
    table = ", ".join(f"{name} {count}" for name, count in counts.items())
    run.say(f"done at step {run.step}, {clock.seconds():.0f} s trained in all; steps: {table}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, help="folder of the run")
    parser.add_argument("--autoencoder", default=str(VIDEO), help="pipeline whose it is")
    parser.add_argument("--seconds", type=float, required=True, help="wall time of this process")
    parser.add_argument("--total", type=float, default=1000.0, help="seconds of the schedule")
    parser.add_argument("--finish", action="store_true", help="the schedule ends with this process")
    parser.add_argument("--steps", type=int, default=1 << 40, help="stop at this step")
    parser.add_argument("--rate", type=float, default=RATE, help="largest learning rate")
    parser.add_argument("--budget", type=int, default=BUDGET, help="tokens of a step and rank")
    parser.add_argument(
        "--blank", type=float, default=0.08, help="share of clips without caption, for guidance"
    )
    parser.add_argument("--every", type=float, default=10.0, help="seconds between lines")
    parser.add_argument(
        "--save-every", type=float, default=60.0, help="seconds between checkpoints"
    )
    parser.add_argument("--margin", type=float, default=4.0, help="seconds kept for the last step")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=3, help="processes for a caption source")
    parser.add_argument("--compile", action="store_true", help="compile what is not attention")
    parser.add_argument("--no-bf16", dest="bf16", action="store_false", help="float32 throughout")
    parser.add_argument("--toy", action="store_true", help="tiny clips: a rehearsal of the code")
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    ranks = Ranks(args.device)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = True, 4
    torch._dynamo.config.suppress_errors = True  # eager rather than stop
    run = Run(args, ranks)
    torch.manual_seed(run.step + 7919 * ranks.rank)  # noise and clips of its own
    train(run)
    ranks.close()


if __name__ == "__main__":
    main()
