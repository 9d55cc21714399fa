# SPDX-License-Identifier: Apache-2.0
"""The untrained parts of the pixel-people FluxPipeline: stock diffusers and transformers classes, made small."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    T5Config,
    T5EncoderModel,
)
from word_tokenizers import build_clip_tokenizer, build_t5_tokenizer


CLIP_LENGTH = 32  # tokens; a complete prompt has 24
T5_LENGTH = 24  # tokens; a complete prompt has 23
WIDTHS = {"joint_attention_dim": 64, "pooled_projection_dim": 32}
_LATENT_SCALE = 64.0  # a power of two, so that scaling is exact; large, so that the decoder's tanh is a no-op


def build_identity_vae() -> AutoencoderTiny:
    """An autoencoder that does nothing: one level, no blocks, convolutions set so that decode(encode(x)) = x.

    The decoder's ReLU is passed by carrying z as max(z, 0) and max(-z, 0), which stays accurate in bfloat16.
    """
    vae = AutoencoderTiny(
        encoder_block_out_channels=(3,),
        decoder_block_out_channels=(6,),
        num_encoder_blocks=(0,),
        num_decoder_blocks=(0,),
        latent_channels=3,
        scaling_factor=_LATENT_SCALE,
    )
    first, last = (layer for layer in vae.encoder.layers if isinstance(layer, nn.Conv2d))
    enter, leave = (layer for layer in vae.decoder.layers if isinstance(layer, nn.Conv2d))
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.zero_()
        for c in range(3):
            first.weight[c, c, 1, 1] = 2.0 / _LATENT_SCALE  # the encoder sees (x + 1) / 2
            first.bias[c] = -1.0 / _LATENT_SCALE
            last.weight[c, c, 1, 1] = 1.0
            enter.weight[c, c, 1, 1] = 1.0
            enter.weight[c + 3, c, 1, 1] = -1.0
            leave.weight[c, c, 1, 1] = _LATENT_SCALE / 2.0  # the decoder returns 2 y - 1
            leave.weight[c, c + 3, 1, 1] = -_LATENT_SCALE / 2.0
        leave.bias.fill_(0.5)
    return vae


def build_transformer(*, num_layers: int, num_single_layers: int, num_heads: int) -> FluxTransformer2DModel:
    """A small Flux transformer over 2x2 patches of RGB pixels, with Flux's and DiT's initialization."""
    transformer = FluxTransformer2DModel(
        in_channels=12,
        num_layers=num_layers,
        num_single_layers=num_single_layers,
        attention_head_dim=32,
        num_attention_heads=num_heads,
        axes_dims_rope=(8, 12, 12),
        guidance_embeds=False,
        **WIDTHS,
    )
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if ".norm1" in name or ".norm." in name or name in ("norm_out.linear", "proj_out"):
                nn.init.zeros_(module.weight)  # adaLN-zero (DiT, arXiv:2212.09748): blocks start as identity
    return transformer


def build_pipeline(prompts: Sequence[str], *, num_layers: int, num_single_layers: int, num_heads: int) -> FluxPipeline:
    """All parts together, untrained, as a stock pipeline.

    Args:
        prompts: Prompts that contain every word of the grammar.
        num_layers: Number of double-stream blocks.
        num_single_layers: Number of single-stream blocks.
        num_heads: Number of attention heads; the inner width is 32 times that.
    """
    words = sorted({word.strip(",") for prompt in prompts for word in prompt.split()})
    clip_tokenizer, t5_tokenizer = build_clip_tokenizer(words, CLIP_LENGTH), build_t5_tokenizer(words, T5_LENGTH)
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=WIDTHS["pooled_projection_dim"],
            projection_dim=WIDTHS["pooled_projection_dim"],
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=CLIP_LENGTH,
            bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=clip_tokenizer.eos_token_id,
            pad_token_id=clip_tokenizer.pad_token_id,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer),
            d_model=WIDTHS["joint_attention_dim"],
            d_kv=16,
            d_ff=128,
            num_layers=1,
            num_heads=4,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=24,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
        )
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=build_identity_vae(),
        text_encoder=clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=build_transformer(num_layers=num_layers, num_single_layers=num_single_layers, num_heads=num_heads),
    )
