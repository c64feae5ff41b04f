"""A transformer that no library knows, in a sampling loop of its own: found, watched, accelerated.

python examples/own_model.py
"""

import argparse

import torch
from torch import Tensor, nn

import flashomni


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x) + shift).unflatten(-1, (3, self.heads, -1)).unbind(2)
        o = nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        x = x + self.out(o.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Mine(nn.Module):
    def __init__(self, width: int = 64, heads: int = 2, depth: int = 6) -> None:
        super().__init__()
        self.time = nn.Linear(1, width)
        self.layers = nn.ModuleList(Block(width, heads) for _ in range(depth))

    def forward(self, latents: Tensor, text: Tensor, time: Tensor) -> Tensor:
        x, shift = torch.cat([text, latents], dim=1), self.time(time)
        for layer in self.layers:
            x = layer(x, shift)
        return x[:, text.shape[1] :]


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", default="balanced")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--tokens", type=int, default=1000)
    args = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = Mine().to(device).eval()
    latents = torch.randn(1, args.tokens, 64, device=device)
    text = torch.randn(1, 77, 64, device=device)

    # Lists of blocks are found where each holds an attention module; others are named, as here.
    # Where the text is in the sequence has to be said.
    blocks = flashomni.Blocks(lists=["layers"], text="first", text_from="text")
    with flashomni.accelerate(model, args.recipe, blocks=blocks) as engine:
        for step in range(args.steps):
            engine.step(step, args.steps)
            time = torch.full((1, 1, 1), 1 - step / args.steps, device=device)
            latents = latents - model(latents, text, time) / args.steps
        print(engine.report())


if __name__ == "__main__":
    main()
