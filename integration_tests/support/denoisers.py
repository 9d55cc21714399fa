# SPDX-License-Identifier: Apache-2.0
"""Denoisers of the stock classes with a block or two, 128 channels wide where the class allows it."""

import torch
from diffusers import (
    Flux2Transformer2DModel,
    Flux3Transformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)


def flux() -> FluxTransformer2DModel:
    # Inputs of 128 and 512 and more: the "all-linear" model whose bits per weight are asserted.
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=8,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(8, 12, 12),
        guidance_embeds=True,
    )


def flux_of_full_width() -> FluxTransformer2DModel:
    """0.5 billion weights, for programs that know the released width only."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    model = model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.uniform_(parameter, -0.03, 0.03)
        else:
            torch.nn.init.constant_(parameter, 1.0 if name.endswith("weight") else 0.01)
    return model


def large_flux(blocks: int, single_blocks: int) -> FluxTransformer2DModel:
    """Tens of megabytes in bfloat16, to measure memory with."""
    with torch.device("meta"):
        shape = FluxTransformer2DModel(
            num_layers=blocks,
            num_single_layers=single_blocks,
            attention_head_dim=64,
            num_attention_heads=16,
            axes_dims_rope=(16, 24, 24),
        )
    model = shape.to_empty(device="cpu").to(torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model


def flux2() -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=128,
        timestep_guidance_channels=32,
        axes_dims_rope=(16, 16, 16, 16),
        guidance_embeds=False,
    )


def flux3() -> Flux3Transformer2DModel:
    """As the distilled checkpoints, which embed the timestep that a step leads to."""
    return Flux3Transformer2DModel(
        in_channels=16,
        cond_in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=128,
        timestep_channels=32,
        axes_dims_rope=(16, 16, 16, 16),
        flow_map=True,
    )


def sd3() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        caption_projection_dim=64,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
        pos_embed_max_size=16,
    )


def sd35_medium() -> SD3Transformer2DModel:
    """Two blocks, the first with a second attention; RMS norms of queries and keys."""
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=4,
        caption_projection_dim=256,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def sana() -> SanaTransformer2DModel:
    return SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=4,
        attention_head_dim=16,
        num_cross_attention_heads=4,
        cross_attention_head_dim=16,
        cross_attention_dim=64,
        caption_channels=32,
        sample_size=8,
    )


def pixart() -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=16,
        num_attention_heads=4,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=64,
        out_channels=8,
        norm_type="ada_norm_single",
        use_additional_conditions=False,
    )


def qwen_image(heads: int = 4, axes: tuple[int, int, int] = (4, 6, 6)) -> QwenImageTransformer2DModel:
    """A head has the channels of the three axes."""
    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=sum(axes),
        num_attention_heads=heads,
        joint_attention_dim=32,
        axes_dims_rope=axes,
    )


def z_image(heads: int = 4, axes: tuple[int, int, int] = (4, 6, 6), layers: int = 2) -> ZImageTransformer2DModel:
    """A head has the channels of the three axes; the feed-forward layers are 8/3 times as wide as the model."""
    return ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=heads * sum(axes),
        n_layers=layers,
        n_refiner_layers=1,
        n_heads=heads,
        n_kv_heads=heads,
        cap_feat_dim=32,
        axes_dims=list(axes),
        axes_lens=[256, 32, 32],
    )


def sdxl_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=80,
        cross_attention_dim=64,
    )


def plain_unet() -> UNet2DConditionModel:
    """As of Stable Diffusion 1.5: convolutional projections, no added embeddings."""
    return UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=32,
    )


def wan(channels: int = 4) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=channels,
        out_channels=channels,
        text_dim=32,
        freq_dim=64,
        ffn_dim=128,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )


@torch.no_grad()
def predict(model: torch.nn.Module, dtype: torch.dtype | None = None) -> torch.Tensor:
    """What a Flux, SD3, Qwen-Image, Z-Image, PixArt or Wan denoiser of this file predicts, always from the same noise.

    The inputs are in `dtype`, by default the model's own.
    """
    generator = torch.Generator().manual_seed(0)
    dtype = dtype or model.dtype

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    inputs = {
        FluxTransformer2DModel: lambda: {
            "hidden_states": noise(1, 16, 4),
            "encoder_hidden_states": noise(1, 8, 32),
            "pooled_projections": noise(1, 32),
            "timestep": torch.tensor([0.5], dtype=dtype),
            "guidance": torch.tensor([3.5], dtype=dtype),
            "img_ids": torch.zeros(16, 3),
            "txt_ids": torch.zeros(8, 3),
        },
        Flux2Transformer2DModel: lambda: {
            "hidden_states": noise(1, 8, 16),
            "encoder_hidden_states": noise(1, 5, 128),
            "timestep": torch.tensor([0.5], dtype=dtype),
            "img_ids": torch.zeros(8, 4),
            "txt_ids": torch.zeros(5, 4),
        },
        SD3Transformer2DModel: lambda: {
            "hidden_states": noise(1, 4, 8, 8),
            "encoder_hidden_states": noise(1, 5, 32),
            "pooled_projections": noise(1, 64),
            "timestep": torch.tensor([1.0]),
        },
        QwenImageTransformer2DModel: lambda: {
            "hidden_states": noise(1, 8, 16),
            "encoder_hidden_states": noise(1, 5, 32),
            "encoder_hidden_states_mask": torch.ones(1, 5, dtype=torch.int64),
            "timestep": torch.tensor([0.5], dtype=dtype),
            "img_shapes": [[(1, 2, 4)]],
        },
        ZImageTransformer2DModel: lambda: {
            "x": [noise(16, 1, 4, 8)],
            "t": torch.tensor([0.5], dtype=dtype),
            "cap_feats": [noise(5, 32)],
        },
        PixArtTransformer2DModel: lambda: {
            "hidden_states": noise(1, 4, 8, 8),
            "encoder_hidden_states": noise(1, 6, 32),
            "timestep": torch.tensor([500]),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
        WanTransformer3DModel: lambda: {
            "hidden_states": noise(1, 4, 2, 8, 8),
            "encoder_hidden_states": noise(1, 6, 32),
            "timestep": torch.tensor([500]),
        },
    }
    denoiser = getattr(model, "_orig_mod", model)  # below the wrapper of torch.compile
    prediction = model(**inputs[type(denoiser)](), return_dict=False)[0]
    return prediction[0] if isinstance(prediction, list) else prediction  # one for each picture
