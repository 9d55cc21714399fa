# SPDX-License-Identifier: Apache-2.0
"""Further stock pipelines, tiny: conditioned ones, two denoisers, ControlNets, video."""

from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKLFlux2,
    AutoencoderKLWan,
    ChromaPipeline,
    ChromaTransformer2DModel,
    ControlNetModel,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
)
from PIL import Image

from . import architectures, denoisers, text_encoders, tokenizers, video_pipelines
from .pipelines import PIPELINES, TinyPipeline, autoencoder


FLUX = {
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (8, 12, 12),
}
PICTURE = Image.new("RGB", (16, 16), (200, 40, 90))


def _flux_like(cls: type[DiffusionPipeline], in_channels: int, **extra: Any) -> DiffusionPipeline:
    components = PIPELINES["flux"].make().components
    components["transformer"] = FluxTransformer2DModel(
        in_channels=in_channels, out_channels=4, guidance_embeds=True, **FLUX
    )
    components = {name: components[name] for name in cls._get_signature_keys(cls)[0] if name in components}
    return cls(**components, **extra)


def _t5_and(cls: type[DiffusionPipeline], transformer: torch.nn.Module, channels: int) -> DiffusionPipeline:
    return cls(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder(channels, shift_factor=0.0, scaling_factor=1.0),
        text_encoder=text_encoders.t5(),
        tokenizer=tokenizers.t5_tokenizer(),
        transformer=transformer,
    )


def _chroma() -> DiffusionPipeline:
    config = {**architectures.descriptions()["ChromaTransformer2DModel"]["config"], "joint_attention_dim": 32}
    return _t5_and(ChromaPipeline, ChromaTransformer2DModel(**{**config, "in_channels": 4}), 1)


def _aura_flow() -> DiffusionPipeline:
    config = {**architectures.descriptions()["AuraFlowTransformer2DModel"]["config"], "joint_attention_dim": 32}
    return _t5_and(AuraFlowPipeline, AuraFlowTransformer2DModel(**config), config["in_channels"])


def _wan() -> DiffusionPipeline:
    return WanPipeline(
        tokenizer=tokenizers.t5_tokenizer(),
        text_encoder=text_encoders.t5(),
        vae=AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=denoisers.wan(channels=16),
        transformer_2=denoisers.wan(channels=16),
        boundary_ratio=0.875,
    )


def _stable_diffusion(cls: type[DiffusionPipeline] = StableDiffusionPipeline, **extra: Any) -> DiffusionPipeline:
    unet = {**architectures.descriptions()["UNet2DConditionModel"]["config"], "cross_attention_dim": 32}
    return cls(
        vae=autoencoder(4, use_quant_conv=True, use_post_quant_conv=True),
        text_encoder=text_encoders.clip(),
        tokenizer=tokenizers.clip_tokenizer(),
        unet=UNet2DConditionModel(**unet),
        scheduler=EulerDiscreteScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **extra,
    )


def _stable_diffusion_controlnet() -> DiffusionPipeline:
    config = {**architectures.descriptions()["ControlNetModel"]["config"], "cross_attention_dim": 32}
    config["conditioning_embedding_out_channels"] = [4, 8]
    return _stable_diffusion(StableDiffusionControlNetPipeline, controlnet=ControlNetModel(**config))


def _sana_sprint() -> DiffusionPipeline:
    config = dict(denoisers.sana().config)
    components = PIPELINES["sana"].make().components
    options = {name: value for name, value in config.items() if not name.startswith("_")}
    return SanaSprintPipeline(
        tokenizer=components["tokenizer"],
        text_encoder=components["text_encoder"],
        vae=components["vae"],
        transformer=SanaTransformer2DModel(
            **{**options, "guidance_embeds": True, "guidance_embeds_scale": 0.1, "qk_norm": "rms_norm_across_heads"}
        ),
        scheduler=SCMScheduler(),
    )


def _lumina2() -> DiffusionPipeline:
    config = {**architectures.descriptions()["Lumina2Transformer2DModel"]["config"], "cap_feat_dim": 32}
    return Lumina2Pipeline(
        transformer=Lumina2Transformer2DModel(**config),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder(config["in_channels"], shift_factor=0.0, scaling_factor=1.0),
        text_encoder=text_encoders.gemma(),
        tokenizer=tokenizers.gemma_tokenizer(),
    )


def _flux2() -> DiffusionPipeline:
    # The latents are patched two by two, and the text is two layers of the encoder side by side.
    config = {**architectures.descriptions()["Flux2Transformer2DModel"]["config"], "joint_attention_dim": 64}
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKLFlux2(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            latent_channels=config["in_channels"] // 4,
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=16,
        ),
        text_encoder=text_encoders.qwen3_with_head(),
        tokenizer=tokenizers.qwen_tokenizer(),
        transformer=Flux2Transformer2DModel(**config),
    )


def _hidream() -> DiffusionPipeline:
    # The pipeline scales every size up to 128 x 128 latents: patches of 8 keep the sequence short.
    config = {
        **architectures.descriptions()["HiDreamImageTransformer2DModel"]["config"],
        "caption_channels": [32, 32],
        "text_emb_dim": 64,
        "patch_size": 8,
    }
    return HiDreamImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder(config["in_channels"], shift_factor=0.0, scaling_factor=1.0),
        text_encoder=text_encoders.clip_with_projection(),
        tokenizer=tokenizers.clip_tokenizer(),
        text_encoder_2=text_encoders.clip_with_projection(),
        tokenizer_2=tokenizers.clip_tokenizer(),
        text_encoder_3=text_encoders.t5(),
        tokenizer_3=tokenizers.t5_tokenizer(),
        text_encoder_4=text_encoders.llama_with_head(),
        tokenizer_4=tokenizers.llama_tokenizer(),
        transformer=HiDreamImageTransformer2DModel(**config),
    )


_SHORT = {"max_sequence_length": 16}
MORE_PIPELINES = {
    "flux_kontext": TinyPipeline(
        lambda: _flux_like(FluxKontextPipeline, 4),
        {**_SHORT, "image": PICTURE, "_auto_resize": False, "max_area": 256},
    ),
    "flux_fill": TinyPipeline(
        lambda: _flux_like(FluxFillPipeline, 24), {**_SHORT, "image": PICTURE, "mask_image": PICTURE.convert("L")}
    ),
    "flux_control": TinyPipeline(lambda: _flux_like(FluxControlPipeline, 8), {**_SHORT, "control_image": PICTURE}),
    "flux_controlnet": TinyPipeline(
        lambda: _flux_like(FluxControlNetPipeline, 4, controlnet=FluxControlNetModel(in_channels=4, **FLUX)),
        {**_SHORT, "control_image": PICTURE},
    ),
    "chroma": TinyPipeline(_chroma, {**_SHORT, "negative_prompt": "a dog"}),
    "flux2_klein": TinyPipeline(_flux2, {"max_sequence_length": 64, "text_encoder_out_layers": (1, 2)}),
    "hidream": TinyPipeline(_hidream, {**_SHORT, "negative_prompt": "a dog"}),
    "aura_flow": TinyPipeline(_aura_flow, {**_SHORT}),
    "wan_2_2": TinyPipeline(_wan, {**_SHORT, "num_frames": 5}, ("transformer", "transformer_2")),
    "ltx": TinyPipeline(video_pipelines.ltx, {**_SHORT, "num_frames": 5}, size=32),
    "cogvideox": TinyPipeline(video_pipelines.cogvideox, {**_SHORT, "num_frames": 5}),
    "hunyuan_video": TinyPipeline(
        video_pipelines.hunyuan_video,
        {**_SHORT, "num_frames": 5, "prompt_template": {"template": "A video: {}", "crop_start": 9}},
    ),
    "sana_sprint": TinyPipeline(
        _sana_sprint,
        {**_SHORT, "complex_human_instruction": None, "use_resolution_binning": False},
        size=32,
    ),
    "lumina2": TinyPipeline(_lumina2, {**_SHORT}),
    "stable_diffusion": TinyPipeline(_stable_diffusion, {}, ("unet",)),
    "stable_diffusion_controlnet": TinyPipeline(_stable_diffusion_controlnet, {"image": PICTURE}, ("unet",)),
}
