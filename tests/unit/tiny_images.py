"""Configurations and arguments of small instances of diffusers' transformers of images."""

import torch
from tiny_parts import FLUX, HUNYUAN, SIZES, B, flux, ids, rand, time, valid

# class -> (configuration, arguments of one call)
IMAGES = {
    "AuraFlowTransformer2DModel": (
        {
            "sample_size": 12, "num_mmdit_layers": 2, "num_single_dit_layers": 2,
            "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 24,
            "caption_projection_dim": 32, "pos_embed_max_size": 36,
        },
        lambda: {
            "hidden_states": rand(B, 4, 12, 10),
            "encoder_hidden_states": rand(B, 9, 24),
            "timestep": time(0.5),
        },
    ),
    "BriaTransformer2DModel": (FLUX, flux),
    "BriaFiboTransformer2DModel": (
        {**FLUX, "text_encoder_dim": 16, "joint_attention_dim": 24},
        lambda: flux(text_encoder_layers=[rand(B, 9, 16) for _ in range(4)]),
    ),
    "ChromaTransformer2DModel": (
        {
            **FLUX, "approximator_num_channels": 8, "approximator_hidden_dim": 16,
            "approximator_layers": 1,
        },
        flux,
    ),
    "CogView3PlusTransformer2DModel": (
        {
            "in_channels": 4, "num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2,
            "out_channels": 4, "text_embed_dim": 16, "time_embed_dim": 8, "condition_dim": 2,
            "pos_embed_max_size": 8, "sample_size": 12,
        },
        lambda: {
            "hidden_states": rand(B, 4, 10, 12),
            "encoder_hidden_states": rand(B, 7, 16),
            "timestep": time(),
            **SIZES,
        },
    ),
    "CogView4Transformer2DModel": (
        {
            "in_channels": 4, "num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2,
            "out_channels": 4, "text_embed_dim": 16, "time_embed_dim": 8, "condition_dim": 4,
            "rope_axes_dim": (8, 8), "sample_size": 12,
        },
        lambda: {
            "hidden_states": rand(B, 4, 10, 12),
            "encoder_hidden_states": rand(B, 7, 16),
            "timestep": time(),
            **SIZES,
        },
    ),
    "DiTTransformer2DModel": (
        {
            "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 3,
            "sample_size": 10, "norm_num_groups": 4, "num_embeds_ada_norm": 8, "out_channels": 4,
        },
        lambda: {
            "hidden_states": rand(B, 4, 10, 10),
            "timestep": time(5).long(),
            "class_labels": torch.tensor([1, 3]),
        },
    ),
    "ErnieImageTransformer2DModel": (
        {
            "hidden_size": 32, "num_attention_heads": 2, "num_layers": 3, "ffn_hidden_size": 48,
            "in_channels": 4, "out_channels": 4, "text_in_dim": 16, "rope_axes_dim": (4, 6, 6),
        },
        lambda: {
            "hidden_states": rand(B, 4, 5, 7),
            "timestep": time(),
            "text_bth": rand(B, 9, 16),
            "text_lens": torch.tensor([9, 5]),
        },
    ),
    "Flux2Transformer2DModel": (
        {
            **FLUX, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 16,
        },
        lambda: flux(axes=4, guidance=time(4.0)),
    ),
    "GlmImageTransformer2DModel": (
        {
            "in_channels": 4, "num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2,
            "out_channels": 4, "text_embed_dim": 16, "time_embed_dim": 8, "condition_dim": 4,
            "prior_vq_quantizer_codebook_size": 16,
        },
        lambda: {
            "hidden_states": rand(B, 4, 10, 12),
            "encoder_hidden_states": rand(B, 7, 16),
            "prior_token_id": torch.arange(30).remainder(16).expand(B, -1),
            "prior_token_drop": torch.zeros(B, 30, dtype=torch.bool),
            "timestep": time(),
            "target_size": SIZES["target_size"],
            "crop_coords": SIZES["crop_coords"],
        },
    ),
    "HiDreamImageTransformer2DModel": (
        {
            "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2,
            "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
            "caption_channels": [16, 12], "text_emb_dim": 20, "num_routed_experts": 2,
            "num_activated_experts": 1, "axes_dims_rope": (4, 4, 8), "max_resolution": (8, 8),
            "llama_layers": [0, 1, 2, 3], "force_inference_output": True,
        },
        lambda: {
            "hidden_states": rand(B, 4, 8, 8),
            "encoder_hidden_states_t5": rand(B, 7, 16),
            "encoder_hidden_states_llama3": rand(4, B, 7, 12),
            "pooled_embeds": rand(B, 20),
            "timesteps": time(),
        },
    ),
    "HunyuanDiT2DModel": (
        {
            "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 6,
            "attention_head_dim": 8, "num_attention_heads": 2, "cross_attention_dim": 16,
            "cross_attention_dim_t5": 16, "pooled_projection_dim": 4, "hidden_size": 16,
            "text_len": 4, "text_len_t5": 4, "activation_fn": "gelu-approximate",
        },
        lambda: {
            "hidden_states": rand(B, 4, 8, 8),
            "encoder_hidden_states": rand(B, 4, 16),
            "text_embedding_mask": torch.ones(B, 4),
            "encoder_hidden_states_t5": rand(B, 4, 16),
            "text_embedding_mask_t5": torch.ones(B, 4),
            "timestep": time(),
            "image_meta_size": rand(B, 6),
            "style": torch.zeros(B, dtype=torch.long),
            "image_rotary_emb": [rand(16, 8), rand(16, 8)],
        },
    ),
    "HunyuanImageTransformer2DModel": (
        {**HUNYUAN, "num_single_layers": 2, "patch_size": (1, 1), "rope_axes_dim": (8, 8)},
        lambda: {
            "hidden_states": rand(B, 4, 5, 7),
            "timestep": time(),
            "encoder_hidden_states": rand(B, 9, 16),
            "encoder_attention_mask": valid(9, 9, 5),
        },
    ),
    "Krea2Transformer2DModel": (
        {
            "in_channels": 4, "num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2,
            "num_key_value_heads": 1, "intermediate_size": 48, "timestep_embed_dim": 16,
            "text_hidden_dim": 16, "num_text_layers": 3, "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2, "text_intermediate_size": 24,
            "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 6, 6),
        },
        lambda: {
            "hidden_states": rand(B, 35, 4),
            "encoder_hidden_states": rand(B, 9, 3, 16),
            "timestep": time(0.5),
            "position_ids": torch.cat([torch.zeros(9, 3), ids(1, 5, 7)]),
        },
    ),
    "Lumina2Transformer2DModel": (
        {
            "sample_size": 10, "in_channels": 4, "hidden_size": 32, "num_layers": 3,
            "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1,
            "multiple_of": 2, "axes_dim_rope": (4, 6, 6), "axes_lens": (32, 16, 16),
            "cap_feat_dim": 16,
        },
        lambda: {
            "hidden_states": rand(B, 4, 10, 6),
            "timestep": time(0.5),
            "encoder_hidden_states": rand(B, 7, 16),
            "encoder_attention_mask": valid(7, 7, 7),
        },
    ),
    "LuminaNextDiT2DModel": (
        {
            "sample_size": 8, "in_channels": 4, "hidden_size": 32, "num_layers": 2,
            "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 16,
            "cross_attention_dim": 16,
        },
        lambda: {
            "hidden_states": rand(B, 4, 8, 8),
            "timestep": time(0.5),
            "encoder_hidden_states": rand(B, 7, 16),
            "encoder_mask": valid(7, 7, 4),
            "image_rotary_emb": torch.polar(torch.ones(8, 8, 8), rand(8, 8, 8)),
            "cross_attention_kwargs": {},
        },
    ),
    "OmniGenTransformer2DModel": (
        {
            "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2,
            "intermediate_size": 48, "num_layers": 3, "pad_token_id": 0, "vocab_size": 20,
            "pos_embed_max_size": 16, "time_step_dim": 16,
            "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8, "type": "su"},
        },
        lambda: {
            "hidden_states": rand(B, 4, 8, 8),
            "timestep": time(0.5),
            "input_ids": torch.arange(7).expand(B, -1),
            "input_img_latents": [],
            "input_image_sizes": {},
            "attention_mask": torch.ones(B, 24, 24, dtype=torch.long),
            "position_ids": torch.arange(24).expand(B, -1),
        },
    ),
    "OvisImageTransformer2DModel": ({**FLUX, "out_channels": 4}, flux),
    "PRXTransformer2DModel": (
        {
            "in_channels": 4, "context_in_dim": 16, "hidden_size": 32, "mlp_ratio": 2.0,
            "num_heads": 2, "depth": 3, "axes_dim": [8, 8],
        },
        lambda: {
            "hidden_states": rand(B, 4, 10, 6),
            "timestep": time(0.5),
            "encoder_hidden_states": rand(B, 7, 16),
        },
    ),
    "PixArtTransformer2DModel": (
        {
            "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4,
            "out_channels": 4, "num_layers": 3, "cross_attention_dim": 32, "sample_size": 10,
            "norm_num_groups": 1, "caption_channels": 16, "use_additional_conditions": False,
        },
        lambda: {
            "hidden_states": rand(B, 4, 10, 10),
            "encoder_hidden_states": rand(B, 7, 16),
            "timestep": time(),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            "encoder_attention_mask": valid(7, 7, 4).long(),
        },
    ),
    "SD3Transformer2DModel": (
        {
            "sample_size": 10, "in_channels": 4, "num_layers": 3, "attention_head_dim": 16,
            "num_attention_heads": 2, "joint_attention_dim": 24, "caption_projection_dim": 32,
            "pooled_projection_dim": 20, "out_channels": 4, "pos_embed_max_size": 8,
            "dual_attention_layers": (0,), "qk_norm": "rms_norm",
        },
        lambda: {
            "hidden_states": rand(B, 4, 10, 10),
            "encoder_hidden_states": rand(B, 9, 24),
            "pooled_projections": rand(B, 20),
            "timestep": time(),
        },
    ),
    "SanaTransformer2DModel": (
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2,
            "attention_head_dim": 16, "num_layers": 3, "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 16, "cross_attention_dim": 32, "caption_channels": 16,
            "sample_size": 10,
        },
        lambda: {
            "hidden_states": rand(B, 4, 10, 6),
            "encoder_hidden_states": rand(B, 7, 16),
            "timestep": time(),
        },
    ),
    "StableAudioDiTModel": (
        {
            "sample_size": 35, "in_channels": 4, "num_layers": 3, "attention_head_dim": 16,
            "num_attention_heads": 2, "num_key_value_attention_heads": 1, "out_channels": 4,
            "cross_attention_dim": 16, "time_proj_dim": 8, "global_states_input_dim": 12,
            "cross_attention_input_dim": 16,
        },
        lambda: {
            "hidden_states": rand(B, 4, 35),
            "timestep": time(),
            "encoder_hidden_states": rand(B, 7, 16),
            "global_hidden_states": rand(B, 1, 12),
            "rotary_embedding": (rand(36, 8).cos(), rand(36, 8).sin()),
        },
    ),
    "ZImageTransformer2DModel": (
        {
            "in_channels": 4, "dim": 32, "n_layers": 3, "n_refiner_layers": 1, "n_heads": 2,
            "n_kv_heads": 2, "cap_feat_dim": 16, "axes_dims": (4, 6, 6), "axes_lens": (64, 32, 32),
        },
        lambda: {
            "x": [rand(4, 1, 10, 6) for _ in range(B)],
            "t": time(0.5),
            "cap_feats": [rand(9, 16), rand(5, 16)],
        },
    ),
}  # fmt: skip
