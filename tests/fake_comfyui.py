"""What ComfyUI gives a node, in small: patcher, wrappers, guider, and a model with block patches.

Written from the outside: the names are ComfyUI's, so that a node finds them; no line is.
"""

from __future__ import annotations

import copy
import itertools
import uuid
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def call_wrapped(kind: str, target: Any, owner: Any, options: dict, *args: Any, **kwargs: Any):
    """``target`` inside of all wrappers of a kind, the first one outermost."""
    hooks = [f for each in options.get("wrappers", {}).get(kind, {}).values() for f in each]

    class Executor:
        def __init__(self, rest: list) -> None:
            self.rest, self.class_obj = rest, owner

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            if not self.rest:
                return target(*args, **kwargs)
            return self.rest[0](Executor(self.rest[1:]), *args, **kwargs)

    return Executor(hooks)(*args, **kwargs)


class Patcher:
    def __init__(self, diffusion_model: nn.Module) -> None:
        self.model = SimpleNamespace(diffusion_model=diffusion_model)
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.wrappers: dict[str, dict[str, list]] = {}
        self.attachments: dict[str, Any] = {}

    def clone(self) -> Patcher:
        other = Patcher(self.model.diffusion_model)
        other.model = self.model
        other.model_options = copy.deepcopy(self.model_options)
        other.wrappers = {
            kind: {key: list(each) for key, each in of.items()}
            for kind, of in self.wrappers.items()
        }
        other.attachments = dict(self.attachments)
        return other

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Any) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.wrappers.get(kind, {}).pop(key, None)

    def set_attachments(self, key: str, value: Any) -> None:
        self.attachments[key] = value

    def get_attachment(self, key: str) -> Any:
        return self.attachments.get(key)

    def remove_attachments(self, key: str) -> None:
        self.attachments.pop(key, None)

    def set_model_patch_replace(self, patch: Any, name: str, kind: str, number: int) -> None:
        replaced = self.model_options["transformer_options"].setdefault("patches_replace", {})
        replaced.setdefault(name, {})[kind, number] = patch


class Guider:
    """CFG over one positive and one negative conditioning, in one batch or one by one."""

    def __init__(self, patcher: Patcher, num_text: int = 5, joined: Any = lambda step: True):
        self.model_patcher, self.model_options = patcher, patcher.model_options
        generator = torch.Generator().manual_seed(7)
        self.conds = [torch.randn(1, num_text, 24, generator=generator) for _ in range(2)]
        self.uuids = [uuid.uuid4() for _ in range(2)]
        self.joined, self.step, self.control = joined, 0, None

    def sample(self, noise, latent, sampler, sigmas, denoise_mask=None, callback=None,
               disable_pbar=False, seed=None):  # fmt: skip
        before, self.step = self.model_options, 0
        self.model_options = copy.deepcopy(before)
        options = self.model_options["transformer_options"]
        options["wrappers"] = self.model_patcher.wrappers
        try:
            with torch.inference_mode():
                return call_wrapped("outer_sample", self._outer, self, options,
                                    noise, latent, sampler, sigmas, denoise_mask, callback,
                                    disable_pbar, seed)  # fmt: skip
        finally:
            self.model_options = before

    def _outer(self, noise, latent, sampler, sigmas, *rest):
        self.model_options["transformer_options"]["sample_sigmas"] = sigmas
        return sampler(self._guided, latent + noise * sigmas[0], sigmas)

    def _guided(self, x: Tensor, sigma: Tensor) -> Tensor:
        groups = [[1, 0]] if self.joined(self.step) else [[1], [0]]
        self.step += 1
        found: dict[int, Tensor] = {}
        for group in groups:
            options = {**self.model_options["transformer_options"]}
            options |= {"cond_or_uncond": group, "uuids": [self.uuids[i] for i in group]}
            options["sigmas"] = sigma.reshape(1)
            context = torch.cat([self.conds[i].expand(x.shape[0], -1, -1) for i in group])
            batch = torch.cat([x] * len(group))
            output = self.model_patcher.model.diffusion_model(
                batch, sigma.expand(batch.shape[0]), context, self.control, options
            )
            found |= dict(zip(group, output.chunk(len(group)), strict=True))
        return found[1] + 2.5 * (found[0] - found[1])


def euler(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    for here, there in itertools.pairwise(sigmas):
        x = x + model(x, here) * (there - here)
    return x


def heun(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    for here, there in itertools.pairwise(sigmas):
        d = model(x, here)
        if there > 0:
            d = (d + model(x + d * (there - here), there)) / 2
        x = x + d * (there - here)
    return x


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask=None, skip_reshape=False,
              skip_output_reshape=False, transformer_options=None):  # fmt: skip
    override = (transformer_options or {}).get("optimized_attention_override")
    if override is not None:
        bare = {k: x for k, x in transformer_options.items() if not k.startswith("optimized")}
        said = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
        return override(attention, q, k, v, heads, mask=mask, transformer_options=bare, **said)
    if not skip_reshape:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return o if skip_output_reshape else o.transpose(1, 2).flatten(2)


class Double(nn.Module):
    """Joint attention; writes to the text it is given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp, self.mod = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, img, txt, vec, transformer_options):
        count, both = txt.shape[1], torch.cat([txt, img], 1)
        scaled = both * (1 + self.mod(vec)[:, None])
        q, k, v = self.qkv(scaled).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        o = attention(q, k, v, 4, skip_reshape=True, transformer_options=transformer_options)
        o = self.proj(o)
        img = img + o[:, count:]
        img = img + self.mlp(img).tanh()
        txt += o[:, :count]
        return img, txt


class Single(nn.Module):
    """Writes to what it is given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, vec, transformer_options):
        q, k, v = self.qkv(x + vec[:, None]).chunk(3, -1)
        x += self.proj(attention(q, k, v, 4, transformer_options=transformer_options)).tanh()
        return x


class Cross(nn.Module):
    """Attention over the picture, and to the text, which it does not return."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, vec, txt, transformer_options):
        q, k, v = self.qkv(x + vec[:, None]).chunk(3, -1)
        x = x + self.proj(attention(q, k, v, 4, transformer_options=transformer_options))
        return x + attention(x, txt, txt, 4, transformer_options=transformer_options)


class Flux(nn.Module):
    """Two double and two single blocks, as a model of ComfyUI asks for their patches."""

    def __init__(self, width: int = 64, offers_patches: bool = True) -> None:
        super().__init__()
        self.img_in, self.txt_in = nn.Linear(4, width), nn.Linear(24, width)
        self.time_in, self.out = nn.Linear(1, width), nn.Linear(width, 4)
        self.double_blocks = nn.ModuleList(Double(width) for _ in range(2))
        self.single_blocks = nn.ModuleList(Single(width) for _ in range(2))
        self.offers_patches = offers_patches

    def forward(self, x, timestep, context, control=None, transformer_options=None):
        options = transformer_options
        return call_wrapped("diffusion_model", self._forward, self, options,
                            x, timestep, context, control, options)  # fmt: skip

    def _patch(self, options, key):
        dit = options.get("patches_replace", {}).get("dit", {})
        return dit.get(key) if self.offers_patches else None

    def _forward(self, x, timestep, context, control, transformer_options):
        options = transformer_options
        shape, img = x.shape, self.img_in(x.flatten(2).mT)
        txt, vec = self.txt_in(context), self.time_in(timestep[:, None])
        for i, block in enumerate(self.double_blocks):

            def run(args, block=block):
                img, txt = block(args["img"], args["txt"], args["vec"], args["transformer_options"])
                return {"img": img, "txt": txt}

            args = {"img": img, "txt": txt, "vec": vec, "transformer_options": options}
            patch = self._patch(options, ("double_block", i))
            out = run(args) if patch is None else patch(args, {"original_block": run})
            img, txt = out["img"], out["txt"]
            if control is not None:
                img[:, :3] += control
        img = torch.cat([txt, img], 1)
        for i, block in enumerate(self.single_blocks):

            def run(args, block=block):
                return {"img": block(args["img"], args["vec"], args["transformer_options"])}

            args = {"img": img, "vec": vec, "transformer_options": options}
            patch = self._patch(options, ("single_block", i))
            img = (run(args) if patch is None else patch(args, {"original_block": run}))["img"]
        return self.out(img[:, txt.shape[1] :]).mT.reshape(shape)


class WanModel(Flux):
    """Blocks that get the text and return the picture alone."""

    def __init__(self, width: int = 64) -> None:
        super().__init__(width)
        del self.double_blocks, self.single_blocks
        self.blocks = nn.ModuleList(Cross(width) for _ in range(3))

    def _forward(self, x, timestep, context, control, transformer_options):
        shape, img = x.shape, self.img_in(x.flatten(2).mT)
        txt, vec = self.txt_in(context), self.time_in(timestep[:, None])
        for i, block in enumerate(self.blocks):

            def run(args, block=block):
                each = [args[k] for k in ("img", "vec", "txt", "transformer_options")]
                return {"img": block(*each)}

            args = {"img": img, "txt": txt, "vec": vec, "transformer_options": transformer_options}
            patch = self._patch(transformer_options, ("double_block", i))
            img = (run(args) if patch is None else patch(args, {"original_block": run}))["img"]
        return self.out(img).mT.reshape(shape)


def noise(shape=(1, 4, 12, 14), seed: int = 0) -> Any:
    """ComfyUI's NOISE."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return SimpleNamespace(seed=seed, generate_noise=lambda latent: x)
