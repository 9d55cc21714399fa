# SPDX-License-Identifier: Apache-2.0
"""Names of Sana's original checkpoints in diffusers.

The table follows `scripts/convert_sana_to_diffusers.py` of diffusers, which is not a part of the installed package.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch


# Modules that are 1x1 convolutions.
CONVOLUTIONS = ("mlp.inverted_conv.conv", "mlp.point_conv.conv")
# Tensors of original checkpoints that diffusers computes, or does not use.
BUFFERS = ("pos_embed", "y_embedder.y_embedding", "logvar_linear.weight", "logvar_linear.bias")

_OUTSIDE = {
    "x_embedder.proj": "patch_embed.proj",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "t_embedder.mlp.0": "time_embed.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_embed.emb.timestep_embedder.linear_2",
    "t_block.1": "time_embed.linear",
    "attention_y_norm": "caption_norm",
    "final_layer.linear": "proj_out",
}
_IN_BLOCK = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "attn.q_norm": ("attn1.norm_q",),
    "attn.k_norm": ("attn1.norm_k",),
    "cross_attn.q_linear": ("attn2.to_q",),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",),
    "cross_attn.q_norm": ("attn2.norm_q",),
    "cross_attn.k_norm": ("attn2.norm_k",),
    "mlp.inverted_conv.conv": ("ff.conv_inverted",),
    "mlp.depth_conv.conv": ("ff.conv_depth",),
    "mlp.point_conv.conv": ("ff.conv_point",),
}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
# hidden size → (heads, head size) of the self-attention and of the cross-attention.
_HEADS = {1152: ((36, 32), (16, 72)), 2240: ((70, 32), (20, 112))}


@dataclasses.dataclass(frozen=True)
class Renamed:
    """An original tensor of `shape` and the tensors of diffusers that its rows become, in equal parts."""

    names: tuple[str, ...]
    shape: tuple[int, ...]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every part."""
        return {name: (self.shape[0] // len(self.names), *self.shape[1:]) for name in self.names}

    def split(self, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """The parts of the tensor."""
        yield from zip(self.names, tensor.chunk(len(self.names)), strict=True)


def rename(name: str, shape: tuple[int, ...]) -> Renamed:
    """What an original tensor is called in diffusers.

    Raises:
        ValueError: if Sana has no such tensor.
    """
    if name == "final_layer.scale_shift_table":
        return Renamed(("scale_shift_table",), shape)
    block = _BLOCK.fullmatch(name)
    if block is not None and block[2] == "scale_shift_table":
        return Renamed((f"transformer_blocks.{block[1]}.scale_shift_table",), shape)
    module, _, leaf = (block[2] if block else name).rpartition(".")
    parts = _IN_BLOCK.get(module) if block else ((_OUTSIDE[module],) if module in _OUTSIDE else None)
    if parts is None:
        raise ValueError(f"{name} is not a tensor of Sana. Only Sana models are known in this format.")
    prefix = f"transformer_blocks.{block[1]}." if block else ""
    return Renamed(tuple(f"{prefix}{part}.{leaf}" for part in parts), shape)


def sana_config(shapes: Mapping[str, tuple[int, ...]], *, source: str) -> dict[str, Any]:
    """config.json of a Sana transformer, from the shapes of its original tensors.

    The image size, and with it the interpolation of positions, is not in the weights: it is that of the 1024-pixel
    models. Give a config.json for others.

    Raises:
        ValueError: if it is not a Sana of a published size.
    """
    embedder = shapes.get("x_embedder.proj.weight", (0,))
    hidden = embedder[0]
    if hidden not in _HEADS or "y_embedder.y_proj.fc1.weight" not in shapes:
        raise ValueError(
            f"{source}: the hidden size {hidden} is of no published Sana ({', '.join(map(str, _HEADS))}). Give the "
            "folder with the transformer's config.json (--config)."
        )
    (heads, head_size), (cross_heads, cross_head_size) = _HEADS[hidden]
    blocks = {int(match[1]) for name in shapes if (match := _BLOCK.fullmatch(name))}
    inner = shapes["blocks.0.mlp.inverted_conv.conv.weight"][0]
    return {
        "_class_name": "SanaTransformer2DModel",
        "in_channels": embedder[1],
        "out_channels": embedder[1],
        "num_attention_heads": heads,
        "attention_head_dim": head_size,
        "num_layers": len(blocks),
        "num_cross_attention_heads": cross_heads,
        "cross_attention_head_dim": cross_head_size,
        "cross_attention_dim": hidden,
        "caption_channels": shapes["y_embedder.y_proj.fc1.weight"][1],
        "mlp_ratio": inner / 2 / hidden,
        "attention_bias": False,
        "sample_size": 32,
        "patch_size": embedder[2],
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "interpolation_scale": None,
        "qk_norm": "rms_norm_across_heads" if "blocks.0.attn.q_norm.weight" in shapes else None,
    }
