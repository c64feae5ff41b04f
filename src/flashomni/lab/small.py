"""Small pipelines of stock classes: what all of them have in common; a caller says what differs.

:mod:`flashomni.lab.zoo` builds them with random weights for tests, ``training/`` builds those that
it trains. Only sizes differ.
"""

from __future__ import annotations

from typing import Any

CLIP_TOKENS = 77


def flux(
    tokenizer: Any,
    tokenizer_2: Any,
    scheduler: Any,
    *,
    width: int,
    clip_layers: int,
    t5: dict[str, Any],
    vae: dict[str, Any],
    transformer: dict[str, Any],
) -> Any:
    """A FluxPipeline of four latent channels.

    Args:
        tokenizer: of CLIP.
        tokenizer_2: of T5.
        scheduler: of the pipeline.
        width: of both text encoders.
        clip_layers: of CLIP.
        t5: what differs in T5's configuration, like ``vae`` and ``transformer`` in theirs.
    """
    from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    return FluxPipeline(
        scheduler=scheduler,
        text_encoder=_clip(tokenizer, width, clip_layers),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer_2),
                d_model=width,
                num_heads=2,
                tie_word_embeddings=False,
                **t5,
            )
        ),
        tokenizer_2=tokenizer_2,
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            mid_block_add_attention=False,
            shift_factor=0.0,
            scaling_factor=1.0,
            **vae,
        ),
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            joint_attention_dim=width,
            pooled_projection_dim=width,
            **transformer,
        ),
        image_encoder=None,
        feature_extractor=None,
    )


def hunyuan_video(
    tokenizer: Any,
    tokenizer_2: Any,
    scheduler: Any,
    *,
    channels: int,
    llama: dict[str, Any],
    clip_width: int,
    vae: dict[str, Any],
    transformer: dict[str, Any],
) -> Any:
    """A HunyuanVideoPipeline whose VAE compresses four times in space and in time.

    Args:
        tokenizer: of Llama.
        tokenizer_2: of CLIP.
        scheduler: of the pipeline.
        channels: of the latents.
        llama: what differs in Llama's configuration, ``hidden_size`` among it; like ``vae`` and
            ``transformer`` in theirs.
        clip_width: of CLIP.
    """
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )
    from transformers import LlamaConfig, LlamaModel

    return HunyuanVideoPipeline(
        text_encoder_2=_clip(tokenizer_2, clip_width, 1),
        tokenizer_2=tokenizer_2,
        text_encoder=LlamaModel(
            LlamaConfig(
                vocab_size=len(tokenizer),
                num_hidden_layers=3,  # the pipeline reads hidden_states[-3]: two do nothing
                num_attention_heads=2,
                num_key_value_heads=2,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                **llama,
            )
        ),
        tokenizer=tokenizer,
        vae=AutoencoderKLHunyuanVideo(
            latent_channels=channels,
            down_block_types=("HunyuanVideoDownBlock3D",) * 3,
            up_block_types=("HunyuanVideoUpBlock3D",) * 3,
            layers_per_block=1,
            spatial_compression_ratio=4,
            temporal_compression_ratio=4,
            mid_block_add_attention=False,
            scaling_factor=1.0,
            **vae,
        ),
        transformer=HunyuanVideoTransformer3DModel(
            in_channels=channels,
            out_channels=channels,
            num_refiner_layers=1,
            patch_size=2,
            patch_size_t=1,
            text_embed_dim=llama["hidden_size"],
            pooled_projection_dim=clip_width,
            **transformer,
        ),
        scheduler=scheduler,
    )


def _clip(tokenizer: Any, width: int, layers: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            projection_dim=width,
            max_position_embeddings=CLIP_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
