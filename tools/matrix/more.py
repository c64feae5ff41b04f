"""Small models of classes that neither this repository's tests nor diffusers' have one of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Made = tuple[nn.Module, dict[str, Any]]


def qwen_image_21() -> Made:
    """Text, then the picture; text and picture in blocks that see only what is before them."""
    from diffusers import QwenImage21Transformer2DModel as Model

    model = Model(
        in_channels=8, out_channels=8, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        context_in_dim=24, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    height, width, text = 6, 10, 13
    slots = torch.arange(text + height * width // 4) >= text  # of 2 x 2 tokens
    return model, {
        "hidden_states": torch.randn(2, height * width, 8),
        "encoder_hidden_states": torch.randn(2, text, 24),
        "timestep": torch.full((2,), 0.5),
        "img_shapes": [[(1, height, width)]] * 2,
        "img_mask": slots[None].expand(2, -1),
    }


def bria_fibo_2() -> Made:
    from diffusers import BriaFibo2Transformer2DModel as Model

    model = Model(
        in_channels=4, dim=48, n_layers=4, n_refiner_layers=1, n_heads=3, cap_feat_dim=24,
        injection_layer_ids=(1, 3), perceiver_num_layers=1, min_num_gist_tokens=8,
        max_num_gist_tokens=16, gist_step=4, gist_min_text_len=8, gist_max_text_len=64,
        axes_dims=(4, 6, 6), axes_lens=(64, 64, 64),
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 18, 14),
        "timestep": torch.full((2,), 0.5),
        "encoder_hidden_states": torch.randn(2, 3, 13, 24),
    }


def kandinsky_6() -> Made:
    from diffusers import Kandinsky6Transformer3DModel as Model

    model = Model(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=24, in_text_dim2=20, time_dim=32,
        model_dim=48, ff_dim=96, num_text_blocks=1, num_visual_blocks=3, axes_dims=(4, 6, 6),
        in_audio_dim=6, out_audio_dim=6,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 3, 10, 14, 9),
        "encoder_hidden_states": torch.randn(2, 13, 24),
        "pooled_projections": torch.randn(2, 20),
        "timestep": torch.full((2,), 500.0),
        "audio_hidden_states": torch.randn(2, 11, 6),
    }


def kandinsky_6_sr() -> Made:
    from diffusers import Kandinsky6SRTransformer3DModel as Model

    model = Model(
        in_visual_dim=4, out_visual_dim=4, time_dim=32, model_dim=48, ff_dim=96,
        num_visual_blocks=3, axes_dims=(4, 6, 6), nabla_window=(3, 3, 3), tile_sizes=((16, 16),),
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 2, 16, 16, 9),
        "timestep": torch.full((1,), 500.0),
    }


def sana_wm() -> Made:
    from diffusers import SanaWMTransformer3DModel as Model

    model = Model(
        in_channels=4, num_layers=4, hidden_size=48, num_attention_heads=3, softmax_every_n=2,
        linear_head_dim=16, chunk_plucker_post_attn_blocks=0, use_chunk_plucker_post_attn=False,
        caption_channels=24, image_size=64,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, 3, 9, 7),
        "timestep": torch.full((1, 1, 3), 500.0),
        "encoder_hidden_states": torch.randn(1, 1, 13, 24),
        "mask": torch.ones(1, 13),
    }


def sana_wm_refiner() -> Made:
    from diffusers import SanaWMLTX2RefinerTransformer3DModel as Model

    model = Model(
        in_channels=4, out_channels=4, num_attention_heads=3, attention_head_dim=16,
        cross_attention_dim=48, audio_in_channels=4, audio_out_channels=4,
        audio_num_attention_heads=3, audio_attention_head_dim=8, audio_cross_attention_dim=24,
        num_layers=3, caption_channels=24, rope_double_precision=False,
    )  # fmt: skip
    frames, height, width = 3, 9, 7
    tokens, heads = frames * height * width, 3 * 16
    angles = torch.rand(1, tokens, heads // 2).repeat_interleave(2, -1) * 6
    return model, {
        "hidden_states": torch.randn(1, tokens, 4),
        "encoder_hidden_states": torch.randn(1, 13, 24),
        "timestep": torch.full((1, tokens), 500.0),
        "video_rotary_emb": (angles.cos(), angles.sin()),
        "encoder_attention_mask": torch.ones(1, 13),
    }


def dream_lite() -> Made:
    from diffusers import DreamLiteTransformer2DModel as Model

    model = Model(
        num_attention_heads=3, attention_head_dim=16, in_channels=32, num_layers=3,
        cross_attention_dim=24, norm_num_groups=8, use_linear_projection=True,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 32, 9, 7),
        "encoder_hidden_states": torch.randn(2, 13, 24),
    }


def dual() -> Made:
    from diffusers.models.transformers.dual_transformer_2d import DualTransformer2DModel as Model

    model = Model(
        num_attention_heads=3, attention_head_dim=16, in_channels=32, num_layers=3,
        cross_attention_dim=24, norm_num_groups=8,
    )  # fmt: skip
    model.condition_lengths = [7, 6]
    return model, {
        "hidden_states": torch.randn(2, 32, 9, 7),
        "encoder_hidden_states": torch.randn(2, 13, 24),
    }


def t5_film() -> Made:
    from diffusers import T5FilmDecoder as Model

    model = Model(
        input_dims=8, targets_length=37, d_model=48, num_layers=3, num_heads=3, d_kv=16, d_ff=96
    )
    return model, {
        "encodings_and_masks": [(torch.randn(2, 11, 48), torch.ones(2, 11))],
        "decoder_input_tokens": torch.randn(2, 37, 8),
        "decoder_noise_time": torch.full((2,), 0.5),
    }


def depth_decoder() -> Made:
    from diffusers.models.transformers.minimax_music3_rvq_depth_decoder import (
        MiniMaxMusic3RVQDepthDecoder as Model,
    )

    model = Model(
        hidden_size=48, num_layers=3, num_attention_heads=3, intermediate_size=96,
        audio_vocab_size=32, num_codebooks=4,
    )  # fmt: skip
    return model, {"inputs_embeds": torch.randn(2, 7, 48)}


def proteina() -> Made:
    """A protein's tokens, whose attention has a bias for each pair."""
    from diffusers import RFD4ProteinaTransformer as Model

    times = ("time_emb_bb_ca", "time_emb_local_latents")
    model = Model(
        nlayers=3, token_dim=48, nheads=3, dim_cond=24, pair_repr_dim=16, latent_dim=8,
        token_type_emb_dim=8, cath_emb_dim=8, t_emb_dim=16, seq_sep_dim=8, xt_pair_dist_dim=6,
        feats_seq=("xt_bb_ca", "xt_local_latents"), feats_cond_seq=times, feats_pair_cond=times,
        feats_pair_repr=("xt_bb_ca_pair_dists",), tri_mult_c=8, num_sequence_classes=5,
    )  # fmt: skip
    valid = torch.ones(2, 21, dtype=torch.bool)
    return model, {
        "bb_ca": torch.randn(2, 21, 3),
        "local_latents": torch.randn(2, 21, 8),
        "bb_ca_time": torch.full((2,), 0.5),
        "local_latents_time": torch.full((2,), 0.5),
        "padding_mask": valid,
        "token_type": torch.zeros(2, 21, dtype=torch.long),
        "conditioning": {"is_in_context_conditioning": ~valid, "supports_local_latent": valid},
    }


MORE: dict[str, Callable[[], Made]] = {
    "BriaFibo2Transformer2DModel": bria_fibo_2,
    "DreamLiteTransformer2DModel": dream_lite,
    "DualTransformer2DModel": dual,
    "Kandinsky6SRTransformer3DModel": kandinsky_6_sr,
    "Kandinsky6Transformer3DModel": kandinsky_6,
    "MiniMaxMusic3RVQDepthDecoder": depth_decoder,
    "QwenImage21Transformer2DModel": qwen_image_21,
    "RFD4ProteinaTransformer": proteina,
    "SanaWMLTX2RefinerTransformer3DModel": sana_wm_refiner,
    "SanaWMTransformer3DModel": sana_wm,
    "T5FilmDecoder": t5_film,
}
