# SPDX-License-Identifier: Apache-2.0
"""Text encoders of the stock classes, a few thousand random weights each."""

from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from .tokenizers import CLIP_VOCAB_SIZE


_LLM = {
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 264,
}


def clip_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=32,
        vocab_size=CLIP_VOCAB_SIZE,
        bos_token_id=CLIP_VOCAB_SIZE - 2,
        eos_token_id=CLIP_VOCAB_SIZE - 1,
        pad_token_id=CLIP_VOCAB_SIZE - 1,
    )


def clip() -> CLIPTextModel:
    return CLIPTextModel(clip_config())


def clip_with_projection() -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(clip_config())


def t5(width: int = 32) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=128,
            d_model=width,
            d_kv=8,
            d_ff=2 * width,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )


def gemma() -> Gemma2Model:
    return Gemma2Model(Gemma2Config(**{**_LLM, "vocab_size": 128}, head_dim=16))


def llama() -> LlamaModel:
    return LlamaModel(LlamaConfig(**{**_LLM, "vocab_size": 128}))


def llama_with_head() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**{**_LLM, "vocab_size": 128}))


def qwen3_with_head() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(**_LLM, head_dim=16))


def qwen3() -> Qwen3Model:
    return Qwen3Model(Qwen3Config(**_LLM, head_dim=16))


def qwen_vl() -> Qwen2_5_VLForConditionalGeneration:
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
    }
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    text = {**_LLM, "rope_scaling": rope, "rope_parameters": rope}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
