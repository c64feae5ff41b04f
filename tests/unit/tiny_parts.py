"""What the small instances of diffusers' transformer classes have in common."""

import torch

B = 2


def rand(*shape):
    return torch.randn(*shape)


def time(value=500.0, batch=B):
    return torch.full((batch,), value)


def ids(*sides):
    """Positions ``[N, len(sides)]`` of a raster."""
    return torch.cartesian_prod(*(torch.arange(side) for side in sides)).float()


def valid(length, *counts):
    """A mask ``[B, length]``, the first ``counts`` tokens valid."""
    return torch.arange(length) < torch.tensor(counts)[:, None]


WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
    "out_channels": 4, "text_dim": 16, "freq_dim": 32, "ffn_dim": 32, "num_layers": 3,
}  # fmt: skip


def wan(**more):
    return {
        "hidden_states": rand(B, 4, 2, 10, 6),
        "timestep": time(),
        "encoder_hidden_states": rand(B, 7, 16),
        **more,
    }


FLUX = {
    "patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 2,
    "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 24,
    "axes_dims_rope": (4, 4, 8),
}  # fmt: skip


def flux(axes=3, text_batch=None, **more):
    img = torch.cat([torch.zeros(35, axes - 2), ids(5, 7)], dim=1)
    return {
        "hidden_states": rand(B, 35, 4),
        "encoder_hidden_states": rand(B, 9, 24),
        "timestep": time(0.5),
        "img_ids": img,
        "txt_ids": torch.zeros(9, axes),
        **more,
    }


COG = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4,
    "time_embed_dim": 8, "text_embed_dim": 16, "num_layers": 3, "sample_width": 6,
    "sample_height": 10, "sample_frames": 9, "patch_size": 2, "temporal_compression_ratio": 4,
    "max_text_seq_length": 7,
}  # fmt: skip


def cog(**more):
    return {
        "hidden_states": rand(B, 3, 4, 10, 6),
        "encoder_hidden_states": rand(B, 7, 16),
        "timestep": time().long(),
        **more,
    }


SIZES = {
    name: torch.tensor([[20, 12]] * B) for name in ("original_size", "target_size", "crop_coords")
}
HUNYUAN = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16,
    "num_layers": 2, "num_refiner_layers": 1, "text_embed_dim": 16, "rope_axes_dim": (4, 4, 8),
}  # fmt: skip
