# SPDX-License-Identifier: Apache-2.0
"""Stock pipelines with tiny random weights, complete with tokenizers, built without a network."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    PixArtSigmaPipeline,
    QwenImagePipeline,
    SanaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    ZImagePipeline,
)

from . import denoisers, text_encoders, tokenizers


def autoencoder(latent_channels: int = 4, **options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=16,
        **{"use_quant_conv": False, "use_post_quant_conv": False, **options},
    )


def _flux() -> DiffusionPipeline:
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder(1, shift_factor=0.0, scaling_factor=1.0),
        text_encoder=text_encoders.clip(),
        tokenizer=tokenizers.clip_tokenizer(),
        text_encoder_2=text_encoders.t5(),
        tokenizer_2=tokenizers.t5_tokenizer(),
        transformer=denoisers.flux(),
    )


def _sd3() -> DiffusionPipeline:
    return StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder(4, shift_factor=0.0),
        text_encoder=text_encoders.clip_with_projection(),
        tokenizer=tokenizers.clip_tokenizer(),
        text_encoder_2=text_encoders.clip_with_projection(),
        tokenizer_2=tokenizers.clip_tokenizer(),
        text_encoder_3=text_encoders.t5(),
        tokenizer_3=tokenizers.t5_tokenizer(),
        transformer=denoisers.sd3(),
    )


def _sana() -> DiffusionPipeline:
    return SanaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        vae=AutoencoderDC(
            in_channels=3,
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=[1, 1],
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.41407,
        ),
        text_encoder=text_encoders.gemma(),
        tokenizer=tokenizers.gemma_tokenizer(),
        transformer=denoisers.sana(),
    )


def _pixart() -> DiffusionPipeline:
    return PixArtSigmaPipeline(
        scheduler=DDIMScheduler(),
        vae=autoencoder(4),
        text_encoder=text_encoders.t5(),
        tokenizer=tokenizers.t5_tokenizer(),
        transformer=denoisers.pixart(),
    )


def _qwen_image() -> DiffusionPipeline:
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2, 4],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        text_encoder=text_encoders.qwen_vl(),
        tokenizer=tokenizers.qwen_tokenizer(),
        transformer=denoisers.qwen_image(),
    )


def _z_image() -> DiffusionPipeline:
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder(16, shift_factor=0.0, scaling_factor=1.0),
        text_encoder=text_encoders.qwen3(),
        tokenizer=tokenizers.qwen_tokenizer(),
        transformer=denoisers.z_image(),
    )


def _sdxl() -> DiffusionPipeline:
    return StableDiffusionXLPipeline(
        scheduler=EulerDiscreteScheduler(),
        vae=autoencoder(4, use_quant_conv=True, use_post_quant_conv=True),
        text_encoder=text_encoders.clip(),
        tokenizer=tokenizers.clip_tokenizer(),
        text_encoder_2=text_encoders.clip_with_projection(),
        tokenizer_2=tokenizers.clip_tokenizer(),
        unet=denoisers.sdxl_unet(),
        add_watermarker=False,
    )


@dataclasses.dataclass(frozen=True)
class TinyPipeline:
    """How a pipeline is built and called.

    Args:
        make (`Callable`): builds it; weights follow torch's global seed.
        call (`Mapping`): arguments beside the prompt.
        denoisers (`tuple[str, ...]`): components that are quantized by default.
        size (`int`): height and width in pixels.
    """

    make: Callable[[], DiffusionPipeline]
    call: Mapping[str, Any]
    denoisers: tuple[str, ...] = ("transformer",)
    size: int = 16

    @property
    def denoiser(self) -> str:
        """The only denoiser."""
        (name,) = self.denoisers
        return name

    def build(self) -> DiffusionPipeline:
        torch.manual_seed(0)
        return quiet(self.make())

    def draw(self, pipeline: DiffusionPipeline) -> torch.Tensor:
        """Latents after two steps from a fixed seed, in float32."""
        realign(pipeline)
        size = {"height": self.size, "width": self.size}
        latents, *_ = quiet(pipeline)(
            prompt="a red cat",
            num_inference_steps=2,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
            return_dict=False,
            **{**size, **self.call},
        )
        return torch.as_tensor(latents).float()


PIPELINES = {
    "flux": TinyPipeline(_flux, {"max_sequence_length": 16}),
    "sd3": TinyPipeline(_sd3, {"max_sequence_length": 16}),
    "sana": TinyPipeline(
        _sana,
        {"max_sequence_length": 16, "complex_human_instruction": None, "use_resolution_binning": False},
        size=32,
    ),
    "pixart": TinyPipeline(_pixart, {"max_sequence_length": 16, "use_resolution_binning": False}),
    "qwen_image": TinyPipeline(_qwen_image, {"max_sequence_length": 16, "negative_prompt": "a dog"}),
    "z_image": TinyPipeline(_z_image, {"max_sequence_length": 16}),
    "sdxl": TinyPipeline(_sdxl, {}, ("unet",)),
}


def quiet(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def realign(pipeline: DiffusionPipeline) -> None:
    """Copies all parameters into memory of torch's own alignment.

    Tensors that safetensors maps lie where the file has them, and the last bit of a float32 sum depends on that (in
    float models too): two loads of equal weights are bit-equal only after this.
    """
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            for tensor in [*component.parameters(), *component.buffers()]:
                tensor.data = tensor.data.clone()


def draw(name: str, pipeline: DiffusionPipeline) -> torch.Tensor:
    """What one of [`PIPELINES`] draws."""
    return PIPELINES[name].draw(pipeline)
