"""Train one of the small pipelines: ``python training/train.py image --out runs/image``.

Autoencoder first, then the transformer with its text encoders, coarse to fine (see ``Stage`` in
``training.tiny_models``). Time-boxed by ``--minutes``; run again with the same ``--out`` to resume,
or with ``--start`` to train a finished pipeline further. Writes ``pipeline/`` (diffusers format,
averaged weights), ``state.safetensors``, ``log.json`` and previews.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from diffusers import DiffusionPipeline
from rich.console import Console

from training import flow, sheets, tiny_models
from training.data import LatentPool, Renderer, Source
from training.state import load_state, save_state
from training.vae import train_vae

TRAINED = ("transformer", "text_encoder", "text_encoder_2")


class Run:
    """State of a training run: models, optimiser, averages, clock and log."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.kind = args, tiny_models.KINDS[args.kind]
        self.out = Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.device = args.device
        self.console = Console(width=110)
        self.pipe = tiny_models.build(self.kind)
        self.pipe.to(self.device)
        for part in tiny_models.modules(self.pipe).values():
            part.requires_grad_(False)
        self.log: list[dict] = []
        self.spent = {"vae": 0.0, "flow": 0.0}  # minutes
        self.step, self.state = 0, None
        if (self.out / "state.safetensors").exists():
            self.state = load_state(self.out / "state.safetensors", self.device)
            self.spent, self.step = self.state["spent"], self.state["step"]
            self.log = json.loads((self.out / "log.json").read_text())
            self.pipe.vae.load_state_dict(self.state["vae"])
            self.pipe.vae.register_to_config(**self.state["vae_config"])
        elif args.start:
            self._start_from(args.start)
        self.average = copy.deepcopy({n: getattr(self.pipe, n) for n in TRAINED})
        self.prompts = tiny_models.heldout_prompts(self.kind, 8)

    def _start_from(self, folder: str) -> None:
        """The weights of a saved pipeline; its autoencoder stays as it is."""
        saved = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
        for name, part in tiny_models.modules(saved).items():
            getattr(self.pipe, name).load_state_dict(part.float().state_dict())
        keys = ["scaling_factor"] + ([] if self.kind.video else ["shift_factor"])
        self.pipe.vae.register_to_config(**{key: saved.vae.config[key] for key in keys})

    def report(self, text: str) -> None:
        spent = self.spent["vae"] + self.spent["flow"]
        self.console.print(f"[{self.kind.name} {spent:5.2f} min] {text}", markup=False)

    def parameters(self) -> list[torch.nn.Parameter]:
        parts = (getattr(self.pipe, name) for name in TRAINED)
        return [p for part in parts for p in part.parameters()]

    def averaged(self) -> list[torch.nn.Parameter]:
        return [p for name in TRAINED for p in self.average[name].parameters()]

    def averaged_pipe(self):
        """A copy of the pipeline that shares the averaged modules."""
        pipe = copy.copy(self.pipe)
        for name in TRAINED:
            setattr(pipe, name, self.average[name])
        return pipe

    def save(self, optimiser: torch.optim.Optimizer, preview: str, stage) -> None:
        """Write everything a later run needs, the pipeline as it stands, and a preview."""
        config = self.pipe.vae.config
        keys = ["scaling_factor"] + ([] if self.kind.video else ["shift_factor"])
        state = {
            "spent": self.spent,
            "step": self.step,
            "optimiser": optimiser.state_dict(),
            "vae": self.pipe.vae.state_dict(),
            "vae_config": {k: config[k] for k in keys},
            "live": {n: getattr(self.pipe, n).state_dict() for n in TRAINED},
            "average": {n: self.average[n].state_dict() for n in TRAINED},
        }
        save_state(state, self.out / "state.safetensors")
        (self.out / "log.json").write_text(json.dumps(self.log))
        fresh = tiny_models.build(self.kind)
        for name, part in tiny_models.modules(fresh).items():
            part.load_state_dict((self.average.get(name) or self.pipe.vae).state_dict())
        fresh.vae.register_to_config(**state["vae_config"])
        tiny_models.save(fresh, self.out / "pipeline", self.kind, self.prompts)
        tokens = tiny_models.tokenize(self.pipe, self.prompts)
        tokens = {k: v.to(self.device) for k, v in tokens.items()}
        edge = stage.size // (4 if self.kind.video else 2)
        shape = (
            (8, 8, (stage.frames + 3) // 4, edge, edge) if self.kind.video else (8, 4, edge, edge)
        )
        with torch.autocast(self.device, torch.bfloat16):
            pixels = flow.sample(self.averaged_pipe(), self.kind, shape, tokens, stage.shift)
        sheets.save_sheet(sheets.to_uint8(pixels), self.out / f"{preview}.png")


def train_flow(run: Run, source: Source, renderer: Renderer) -> None:
    """The transformer and its text encoders, stage by stage, on averaged weights."""
    args, kind, device = run.args, run.kind, run.device
    total = args.minutes - (0.0 if args.start else args.vae_minutes)
    for name in TRAINED:
        getattr(run.pipe, name).requires_grad_(True)
    params = run.parameters()
    optimiser = torch.optim.AdamW(
        params, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=device == "cuda"
    )
    if run.state is not None:
        for name in TRAINED:
            getattr(run.pipe, name).load_state_dict(run.state["live"][name])
            run.average[name].load_state_dict(run.state["average"][name])
        optimiser.load_state_dict(run.state["optimiser"])
    for transformer in (run.pipe.transformer, run.average["transformer"]):
        flow.float_residual(transformer)
    rope = run.pipe.transformer.rope if kind.video else None
    if device == "cuda" and not args.eager:
        for block in (
            *run.pipe.transformer.transformer_blocks,
            *run.pipe.transformer.single_transformer_blocks,
        ):
            block.compile(dynamic=False)
    edges = [0.0]
    for stage in kind.stages:
        edges.append(edges[-1] + stage.share * total)
    for number, stage in enumerate(kind.stages):
        if run.spent["flow"] >= edges[number + 1]:
            continue
        if args.toy:
            stage = tiny_models.Stage(stage.share, stage.size, stage.frames, 2, stage.shift)
        if kind.video:
            stride = (kind.frames - 1) // (stage.frames - 1) if stage.frames > 1 else 2
            for model in (run.pipe.transformer, run.average["transformer"]):
                model.rope = flow.StageRope(rope, stride)
        clock = time.time() - 60 * run.spent["flow"]
        group = stage.batch if args.toy else (16 if stage.frames > 17 else 64)
        if stage.batch >= 512:
            group = 512
        capacity = group if args.toy else max(16 * stage.batch, 1024)
        pool = LatentPool(source, renderer, run.pipe.vae, stage, capacity, group)
        run.spent["flow"] = (time.time() - clock) / 60
        run.report(f"stage {number}: {stage}, pool of {capacity} filled")
        begin_step, saved, losses, skipped = run.step, run.spent["flow"], [], 0
        mark = (time.time(), run.step)
        while run.spent["flow"] < edges[number + 1]:
            warm = min(1.0, (run.step + 1) / 400) * min(1.0, (run.step - begin_step + 1) / 50)
            fade = (total - run.spent["flow"]) / (0.45 * total)  # decays in the last 45 %
            fade = 0.03 + 0.97 * 0.5 * (1 - math.cos(math.pi * min(1.0, max(0.0, fade))))
            optimiser.param_groups[0]["lr"] = args.rate * stage.rate * warm * fade
            latents, tokens = pool.batch()
            with torch.autocast(device, torch.bfloat16):
                loss = flow.flow_loss(run.pipe, kind, latents, tokens, stage.shift)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            if torch.nn.utils.clip_grad_norm_(params, 1.0).isfinite():
                optimiser.step()
            else:
                skipped += 1  # a bad batch must not reach the weights
            keep = min(0.999 if stage.batch > 128 else 0.998, (1 + run.step) / (20 + run.step))
            torch._foreach_lerp_(run.averaged(), params, 1 - keep)
            run.step += 1
            losses.append(loss.detach())
            if run.step % 20 == 0:
                torch.cuda.synchronize() if device == "cuda" else None
            run.spent["flow"] = (time.time() - clock) / 60
            if len(losses) == (100 if not args.toy else 2):
                mean = torch.stack(losses).nanmean().item()
                pace = (run.step - mark[1]) / (time.time() - mark[0])
                mark, losses = (time.time(), run.step), []
                run.log.append(
                    {
                        "minutes": run.spent["flow"],
                        "stage": number,
                        "loss": mean,
                        "step": run.step,
                        "samples_per_second": pace * stage.batch,
                    }
                )
                if skipped > 20:
                    raise FloatingPointError(f"{skipped} gradients were not finite")
                if len(run.log) % 2 == 0 or args.toy:
                    run.report(
                        f"step {run.step} loss {mean:.4f} {pace * stage.batch:.0f} samples/s"
                    )
            if run.spent["flow"] - saved > args.save_every:
                run.save(optimiser, f"preview_{number}_{run.step}", stage)
                saved = (time.time() - clock) / 60  # saving counts as time spent
        run.save(optimiser, f"preview_{number}_end", stage)
        del pool
    if kind.video:
        run.pipe.transformer.rope = run.average["transformer"].rope = rope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=tuple(tiny_models.KINDS))
    parser.add_argument("--out", required=True, help="folder of the run")
    parser.add_argument("--start", help="a saved pipeline whose weights to train further")
    parser.add_argument("--rate", type=float, default=1.0, help="factor on the learning rates")
    parser.add_argument("--eager", action="store_true", help="do not compile the blocks")
    parser.add_argument("--minutes", type=float, default=24.0, help="time box of the training")
    parser.add_argument("--vae-minutes", type=float, default=2.0, help="of which autoencoder")
    parser.add_argument("--save-every", type=float, default=3.0, help="minutes between checkpoints")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=12, help="caption workers")
    parser.add_argument("--toy", action="store_true", help="tiny batches: a rehearsal of the code")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.suppress_errors = True  # fall back to eager rather than stop
    run = Run(args)
    source = Source(
        run.pipe,
        run.kind,
        args.device,
        args.workers,
        seed=run.step + 1,
        chunk=16 if args.toy else 512,
    )
    renderer = Renderer(compiled=args.device == "cuda")
    if run.state is None and not args.start:
        begin = time.time()
        train_vae(run.pipe, source, renderer, args.vae_minutes, args.toy, run.report)
        run.spent["vae"] = (time.time() - begin) / 60
        torch.cuda.empty_cache() if args.device == "cuda" else None
    train_flow(run, source, renderer)
    sheets.loss_curve(run.log, run.out / "loss.png")
    sheets.pipeline_sheet(run.out / "pipeline", run.out / "samples.png", args.device)
    run.report("done")


if __name__ == "__main__":
    main()
