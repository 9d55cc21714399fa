# SPDX-License-Identifier: Apache-2.0
"""Tiny video pipelines of the stock classes. Wan, which has two denoisers, is among `more_pipelines`."""

from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)

from . import architectures, text_encoders, tokenizers


def ltx() -> DiffusionPipeline:
    config = {**architectures.descriptions()["LTXVideoTransformer3DModel"]["config"], "caption_channels": 32}
    return LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKLLTXVideo(
            latent_channels=config["in_channels"],
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            patch_size=1,
        ),
        text_encoder=text_encoders.t5(),
        tokenizer=tokenizers.t5_tokenizer(),
        transformer=LTXVideoTransformer3DModel(**config),
    )


def cogvideox() -> DiffusionPipeline:
    # Heads of 16: rotary embeddings split a head's width by 2:3:3, into even parts.
    config = {
        **architectures.descriptions()["CogVideoXTransformer3DModel"]["config"],
        "attention_head_dim": 16,
        "text_embed_dim": 32,
        "max_text_seq_length": 16,
        "use_rotary_positional_embeddings": True,
    }
    return CogVideoXPipeline(
        tokenizer=tokenizers.t5_tokenizer(),
        text_encoder=text_encoders.t5(),
        vae=AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=config["in_channels"],
            layers_per_block=1,
            norm_num_groups=2,
        ),
        transformer=CogVideoXTransformer3DModel(**config),
        scheduler=CogVideoXDDIMScheduler(),
    )


def hunyuan_video() -> DiffusionPipeline:
    config = architectures.descriptions()["HunyuanVideoTransformer3DModel"]["config"]
    return HunyuanVideoPipeline(
        text_encoder=text_encoders.llama(),
        tokenizer=tokenizers.llama_tokenizer(),
        transformer=HunyuanVideoTransformer3DModel(**{**config, "text_embed_dim": 32, "pooled_projection_dim": 32}),
        vae=AutoencoderKLHunyuanVideo(
            latent_channels=config["in_channels"],
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            mid_block_add_attention=False,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder_2=text_encoders.clip(),
        tokenizer_2=tokenizers.clip_tokenizer(),
    )
