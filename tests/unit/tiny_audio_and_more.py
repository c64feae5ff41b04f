"""The rest of ``tiny_models.TINY``: audio, packed sequences, mixtures of experts, histories."""

import torch
from tiny_parts import HUNYUAN, WAN, B, flux, rand, time, valid, wan

MORE = {
    "AceStepTransformer1DModel": (
        {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "in_channels": 12,
            "audio_acoustic_hidden_dim": 4, "sliding_window": 4, "encoder_hidden_size": 16,
        },
        lambda: {
            "hidden_states": rand(B, 35, 4),
            "timestep": time(0.5),
            "timestep_r": time(0.4),
            "encoder_hidden_states": rand(B, 7, 16),
            "context_latents": rand(B, 35, 8),
        },
    ),
    "Flux3Transformer2DModel": (
        {
            "in_channels": 4, "cond_in_channels": 4, "num_layers": 2, "num_single_layers": 2,
            "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 24,
            "timestep_channels": 16, "mlp_ratio": 2.0, "axes_dims_rope": (4, 4, 4, 4),
        },
        lambda: flux(axes=4),
    ),
    "HeliosTransformer3DModel": ({**WAN, "rope_dim": (4, 4, 4)}, wan),
    "HunyuanVideoFramepackTransformer3DModel": (
        {
            **HUNYUAN, "num_single_layers": 2, "pooled_projection_dim": 8,
            "has_image_proj": True, "image_proj_dim": 12, "has_clean_x_embedder": True,
        },
        lambda: {
            "hidden_states": rand(B, 4, 2, 8, 8),
            "timestep": time(),
            "encoder_hidden_states": rand(B, 9, 16),
            "encoder_attention_mask": valid(9, 9, 5),
            "pooled_projections": rand(B, 8),
            "image_embeds": rand(B, 3, 12),
            "indices_latents": torch.arange(2),
            "guidance": time(6.0),
            "latents_clean": rand(B, 4, 1, 8, 8),
            "indices_latents_clean": torch.arange(1),
            "latents_history_2x": rand(B, 4, 2, 8, 8),
            "indices_latents_history_2x": torch.arange(2),
            "latents_history_4x": rand(B, 4, 4, 8, 8),
            "indices_latents_history_4x": torch.arange(4),
        },
    ),
    "Ideogram4Transformer2DModel": (
        {
            "in_channels": 4, "num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2,
            "intermediate_size": 48, "adaln_dim": 8, "llm_features_dim": 12,
            "mrope_section": (4, 2, 2),
        },
        lambda: {
            "hidden_states": rand(1, 44, 4),
            "timestep": time(0.5, 1),
            "encoder_hidden_states": rand(1, 44, 12),
            "position_ids": torch.arange(44)[None, :, None].expand(1, -1, 3),
            "segment_ids": torch.zeros(1, 44, dtype=torch.long),
            "indicator": torch.tensor([3] * 9 + [2] * 35)[None],
        },
    ),
    "JoyImageEditPlusTransformer3DModel": (
        {
            "in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "text_dim": 16,
            "mlp_width_ratio": 2.0, "num_layers": 3, "rope_dim_list": [4, 4, 8],
        },
        lambda: {
            "hidden_states": rand(B, 35, 4, 1, 2, 2),
            "timestep": time(),
            "encoder_hidden_states": rand(B, 7, 16),
            "shape_list": [[(1, 5, 7)], [(1, 5, 6)]],
        },
    ),
    "LongCatAudioDiTTransformer": (
        {
            "dit_dim": 32, "dit_depth": 3, "dit_heads": 2, "dit_text_dim": 16, "latent_dim": 4,
            "use_latent_condition": False,
        },
        lambda: {
            "hidden_states": rand(B, 35, 4),
            "encoder_hidden_states": rand(B, 7, 16),
            "encoder_attention_mask": valid(7, 7, 4),
            "timestep": time(0.5),
            "attention_mask": valid(35, 35, 30),
        },
    ),
    "MiniMaxMusic3Transformer1DModel": (
        {
            "in_channels": 4, "condition_dim": 6, "num_layers": 3, "num_attention_heads": 2,
            "attention_head_dim": 16, "ff_inner_dim": 48, "rotary_dim": 8,
            "fourier_embedding_dim": 8,
        },
        lambda: {
            "hidden_states": rand(B, 4, 35),
            "timestep": time(0.5),
            "encoder_hidden_states": rand(B, 35, 6),
        },
    ),
    "MotifVideoTransformer3DModel": (
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2,
            "attention_head_dim": 16, "num_layers": 2, "num_single_layers": 3,
            "num_decoder_layers": 1, "text_embed_dim": 16, "rope_axes_dim": (4, 4, 8),
            "enable_text_cross_attention_dual": True, "enable_text_cross_attention_single": True,
        },
        lambda: {
            "hidden_states": rand(B, 4, 2, 10, 6),
            "timestep": time(),
            "encoder_hidden_states": rand(B, 9, 16),
            "encoder_attention_mask": valid(9, 9, 5),
        },
    ),
    "NucleusMoEImageTransformer2DModel": (
        {
            "in_channels": 16, "out_channels": 4, "num_layers": 3, "attention_head_dim": 16,
            "num_attention_heads": 2, "num_key_value_heads": 1, "joint_attention_dim": 16,
            "axes_dims_rope": (4, 4, 8), "moe_enabled": False, "capacity_factors": [8.0] * 3,
        },
        lambda: {
            "hidden_states": rand(B, 35, 16),
            "img_shapes": [(1, 5, 7)] * B,
            "encoder_hidden_states": rand(B, 9, 16),
            "encoder_hidden_states_mask": valid(9, 9, 5),
            "timestep": time(0.5),
        },
    ),
    "StableAudio3DiTModel": (
        {
            "io_channels": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "cond_token_dim": 12,
            "global_cond_dim": 12, "local_add_cond_dim": 5, "timestep_features_dim": 16,
            "num_memory_tokens": 3, "ff_mult": 2.0,
        },
        lambda: {
            "hidden_states": rand(B, 4, 35),
            "timestep": time(0.5),
            "encoder_hidden_states": rand(B, 7, 12),
            "global_hidden_states": rand(B, 12),
            "local_add_cond": rand(B, 5, 35),
        },
    ),
    "WanAnimateTransformer3DModel": (
        {
            **WAN, "in_channels": 12, "latent_channels": 4, "image_dim": 16, "num_layers": 4,
            "added_kv_proj_dim": 24, "motion_encoder_size": 16, "motion_style_dim": 8,
            "motion_dim": 4, "motion_encoder_dim": 8, "face_encoder_hidden_dim": 8,
            "face_encoder_num_heads": 2, "inject_face_latents_blocks": 2,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
        },
        lambda: wan(
            hidden_states=rand(1, 12, 2, 10, 6),
            timestep=time(batch=1),
            encoder_hidden_states=rand(1, 7, 16),
            encoder_hidden_states_image=rand(1, 5, 16),
            pose_hidden_states=rand(1, 4, 1, 10, 6),
            face_pixel_values=rand(1, 3, 5, 16, 16),
        ),
    ),
    "PriorTransformer": (
        {
            "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 3,
            "embedding_dim": 12, "num_embeddings": 7, "additional_embeddings": 4,
        },
        lambda: {
            "hidden_states": rand(B, 12),
            "timestep": torch.tensor([5, 5]),
            "proj_embedding": rand(B, 12),
            "encoder_hidden_states": rand(B, 7, 12),
        },
    ),
    "Transformer2DModel": (
        {
            "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 32,
            "num_layers": 3, "norm_num_groups": 4, "cross_attention_dim": 16,
        },
        lambda: {"hidden_states": rand(B, 32, 5, 7), "encoder_hidden_states": rand(B, 7, 16)},
    ),
}  # fmt: skip
