# SPDX-License-Identifier: Apache-2.0
"""IP-Adapters with random weights for tiny pipelines, and calls that use them."""

from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from torch import nn


WIDTH = 24  # of the embedding of a picture
TOKENS = 4


def load(name: str, pipeline: DiffusionPipeline) -> None:
    """Loads an IP-Adapter into a pipeline: `"stable_diffusion"`, `"flux"` or `"sd3"`."""
    if name == "flux":
        transformer = pipeline.transformer
        blocks = [(str(i), transformer.inner_dim) for i in range(transformer.config.num_layers)]
        state = _state(blocks, transformer.config.joint_attention_dim, bias=True)
        pipeline.load_ip_adapter(state, weight_name=None, image_encoder_pretrained_model_name_or_path=None)
    elif name == "sd3":
        pipeline.load_ip_adapter(_sd3_state(pipeline.transformer), weight_name=None, image_encoder_folder=None)
    else:
        unet = pipeline.unet
        crossing = [key.removesuffix(".processor") for key in unet.attn_processors if "attn2" in key]
        layers = [(str(2 * k + 1), unet.get_submodule(key).inner_dim) for k, key in enumerate(crossing)]
        state = _state(layers, unet.config.cross_attention_dim, bias=False)
        pipeline.load_ip_adapter(state, subfolder=None, weight_name=None, image_encoder_folder=None)


def call(name: str, *, picture: bool) -> dict[str, Any]:
    """Keywords of a pipeline call with the embedding of a picture, or of an empty one."""
    embeds = torch.randn(1, 1, WIDTH, generator=torch.Generator().manual_seed(1)) * picture
    if name == "flux":
        return {"ip_adapter_image_embeds": [embeds], "negative_ip_adapter_image_embeds": [0 * embeds]}
    both = torch.cat([torch.zeros_like(embeds), embeds])
    return {"ip_adapter_image_embeds": both if name == "sd3" else [both], "guidance_scale": 3.0}


def _state(layers: list[tuple[str, int]], width: int, *, bias: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    attention = {}
    for key, rows in layers:
        for projection in ("to_k_ip", "to_v_ip"):
            attention[f"{key}.{projection}.weight"] = normal(rows, width)
            if bias:
                attention[f"{key}.{projection}.bias"] = normal(rows)
    projection = {
        "proj.weight": normal(TOKENS * width, WIDTH),
        "proj.bias": normal(TOKENS * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    return {"image_proj": projection, "ip_adapter": attention}


def _sd3_state(transformer: nn.Module) -> dict[str, Any]:
    config = transformer.config
    width = config.attention_head_dim * config.num_attention_heads
    torch.manual_seed(0)
    projection = IPAdapterTimeImageProjection(
        embed_dim=WIDTH, output_dim=width, hidden_dim=64, depth=4, heads=1, num_queries=TOKENS, timestep_in_dim=32
    )
    attention = {}
    for index in range(len(transformer.attn_processors)):
        processor = SD3IPAdapterJointAttnProcessor2_0(width, width, config.attention_head_dim, timesteps_emb_dim=64)
        for parameter in processor.parameters():
            nn.init.normal_(parameter, std=0.5)
        attention |= {f"{index}.{key}": tensor for key, tensor in processor.state_dict().items()}
    return {"image_proj": projection.state_dict(), "ip_adapter": attention}
