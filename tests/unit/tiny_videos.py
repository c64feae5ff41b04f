"""Configurations and arguments of small instances of diffusers' transformers of videos."""

import torch
from tiny_parts import COG, HUNYUAN, WAN, B, cog, rand, time, valid, wan

# class -> (configuration, arguments of one call)
VIDEOS = {
    "AllegroTransformer3DModel": (
        {
            "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4,
            "out_channels": 4, "num_layers": 3, "cross_attention_dim": 48, "sample_width": 6,
            "sample_height": 10, "sample_frames": 2, "caption_channels": 24,
        },
        lambda: {
            "hidden_states": rand(B, 4, 2, 10, 6),
            "encoder_hidden_states": rand(B, 7, 24),
            "timestep": time(),
            "attention_mask": torch.ones(B, 2, 10, 6),
            "encoder_attention_mask": valid(7, 7, 4).long(),
            "image_rotary_emb": allegro_rope(),
        },
    ),
    "AnyFlowTransformer3DModel": (
        {**WAN, "gate_value": 0.25},
        lambda: wan(
            hidden_states=rand(B, 2, 4, 10, 6),
            timestep=rand(B, 2).abs() * 500,
            r_timestep=rand(B, 2).abs() * 100,
        ),
    ),
    "ChronoEditTransformer3DModel": (WAN, wan),
    "CogVideoXTransformer3DModel": (COG, cog),
    "ConsisIDTransformer3DModel": (COG, cog),
    "CosmosTransformer3DModel": (
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2,
            "attention_head_dim": 16, "num_layers": 3, "mlp_ratio": 2, "text_embed_dim": 16,
            "adaln_lora_dim": 4, "max_size": (4, 12, 12), "extra_pos_embed_type": None,
            "concat_padding_mask": False,
        },
        lambda: {
            "hidden_states": rand(1, 4, 2, 10, 6),
            "timestep": time(batch=1),
            "encoder_hidden_states": rand(1, 7, 16),
        },
    ),
    "EasyAnimateTransformer3DModel": (
        {
            "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4,
            "out_channels": 4, "patch_size": 2, "sample_width": 6, "sample_height": 10,
            "num_layers": 3, "mmdit_layers": 3, "time_embed_dim": 8, "text_embed_dim": 16,
        },
        lambda: {
            "hidden_states": rand(B, 4, 2, 10, 6),
            "timestep": time(),
            "encoder_hidden_states": rand(B, 7, 16),
        },
    ),
    "HunyuanVideo15Transformer3DModel": (
        {**HUNYUAN, "text_embed_2_dim": 12, "image_embed_dim": 12, "target_size": 16},
        lambda: {
            "hidden_states": rand(B, 4, 2, 5, 4),
            "timestep": time(),
            "encoder_hidden_states": rand(B, 9, 16),
            "encoder_attention_mask": valid(9, 9, 5),
            "encoder_hidden_states_2": rand(B, 6, 12),
            "encoder_attention_mask_2": valid(6, 6, 3),
            "image_embeds": rand(B, 3, 12),
        },
    ),
    "JoyImageEditTransformer3DModel": (
        {
            "in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "text_dim": 16,
            "mlp_width_ratio": 2.0, "num_layers": 3, "rope_dim_list": [4, 4, 8],
        },
        lambda: {
            "hidden_states": rand(B, 2, 4, 2, 10, 6),
            "timestep": time(),
            "encoder_hidden_states": rand(B, 7, 16),
        },
    ),
    "Kandinsky5Transformer3DModel": (
        {
            "in_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 12, "time_dim": 16,
            "out_visual_dim": 4, "model_dim": 32, "ff_dim": 48, "num_text_blocks": 1,
            "num_visual_blocks": 3, "axes_dims": (4, 4, 8),
        },
        lambda: {
            "hidden_states": rand(1, 2, 10, 6, 4),
            "encoder_hidden_states": rand(1, 7, 16),
            "timestep": time(batch=1),
            "pooled_projections": rand(1, 12),
            "visual_rope_pos": [torch.arange(n) for n in (2, 5, 3)],
            "text_rope_pos": torch.arange(7),
        },
    ),
    "LTXVideoTransformer3DModel": (
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2,
            "attention_head_dim": 16, "cross_attention_dim": 32, "num_layers": 3,
            "caption_channels": 16,
        },
        lambda: {
            "hidden_states": rand(B, 30, 4),
            "encoder_hidden_states": rand(B, 7, 16),
            "timestep": time(),
            "encoder_attention_mask": valid(7, 7, 4).long(),
            "num_frames": 2, "height": 5, "width": 3,
        },
    ),
    "LTX2VideoTransformer3DModel": (
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2,
            "attention_head_dim": 16, "cross_attention_dim": 32, "num_layers": 2,
            "caption_channels": 16, "audio_in_channels": 4, "audio_out_channels": 4,
            "audio_num_attention_heads": 2, "audio_attention_head_dim": 8,
            "audio_cross_attention_dim": 16,
        },
        lambda: {
            "hidden_states": rand(B, 30, 4),
            "audio_hidden_states": rand(B, 9, 4),
            "encoder_hidden_states": rand(B, 7, 16),
            "audio_encoder_hidden_states": rand(B, 7, 16),
            "timestep": time(),
            "encoder_attention_mask": valid(7, 7, 4).long(),
            "audio_encoder_attention_mask": valid(7, 7, 4).long(),
            "num_frames": 2, "height": 5, "width": 3, "audio_num_frames": 9,
        },
    ),
    "LatteTransformer3DModel": (
        {
            "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4,
            "out_channels": 8, "num_layers": 2, "sample_size": 8, "patch_size": 2,
            "caption_channels": 16, "cross_attention_dim": 32, "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False, "num_embeds_ada_norm": 1000, "video_length": 2,
            "attention_bias": True,
        },
        lambda: {
            "hidden_states": rand(B, 4, 2, 8, 8),
            "timestep": time(),
            "encoder_hidden_states": rand(B, 7, 16),
        },
    ),
    "MochiTransformer3DModel": (
        {
            "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 3,
            "pooled_projection_dim": 8, "in_channels": 4, "text_embed_dim": 16,
            "time_embed_dim": 8, "max_sequence_length": 9,
        },
        lambda: {
            "hidden_states": rand(B, 4, 2, 10, 6),
            "encoder_hidden_states": rand(B, 9, 16),
            "timestep": time(),
            "encoder_attention_mask": valid(9, 9, 5),
        },
    ),
    "SanaVideoTransformer3DModel": (
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2,
            "attention_head_dim": 12, "num_layers": 3, "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12, "cross_attention_dim": 24, "caption_channels": 16,
            "sample_size": 10,
        },
        lambda: {
            "hidden_states": rand(B, 4, 2, 10, 6),
            "encoder_hidden_states": rand(B, 7, 16),
            "timestep": time(),
        },
    ),
    "SkyReelsV2Transformer3DModel": (WAN, wan),
    "WanVACETransformer3DModel": (
        {**WAN, "num_layers": 4, "vace_layers": [0, 2], "vace_in_channels": 6},
        lambda: wan(
            control_hidden_states=rand(B, 6, 2, 10, 6),
            control_hidden_states_scale=torch.ones(2),
        ),
    ),
}  # fmt: skip


def allegro_rope():
    """Tables and positions as its pipeline makes them."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    *tables, t, h, w = get_3d_rotary_pos_embed_allegro(24, ((0, 0), (5, 3)), (5, 3), 2)
    positions = torch.cartesian_prod(t.long(), h.long(), w.long())
    return tables, positions.T.reshape(3, 1, -1)
