# SPDX-License-Identifier: Apache-2.0
"""config.json of Flux and Stable Diffusion 3 from the shapes of their original tensors."""

import math
import re
from collections.abc import Mapping
from typing import Any


Shapes = Mapping[str, tuple[int, ...]]


def config_of_shapes(architecture: str, shapes: Shapes, *, source: str) -> dict[str, Any]:
    """The diffusers config that a checkpoint's shapes imply.

    Args:
        architecture (`str`): `"flux"` (FLUX.1) or `"sd3"`; of others, shapes do not settle it.
        shapes (`Mapping`): original tensor name → shape.
        source (`str`): for messages.

    Raises:
        ValueError: if a tensor is missing, or the shapes do not settle it.
    """
    try:
        return {"flux": _flux, "sd3": _sd3}[architecture](shapes)
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise ValueError(
            f"{source}: the shapes do not tell the model's config ({error}). Give its config.json (--config)."
        ) from error


def _count(shapes: Shapes, prefix: str) -> int:
    return 1 + max(int(match[1]) for name in shapes if (match := re.match(rf"{prefix}\.(\d+)\.", name)))


def _flux(shapes: Shapes) -> dict[str, Any]:
    hidden, in_channels = shapes["img_in.weight"]
    head_size = shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0]
    if head_size != 128:
        raise KeyError(f"heads of {head_size} are of no published Flux")
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": in_channels,
        "out_channels": shapes["final_layer.linear.weight"][0],
        "num_layers": _count(shapes, "double_blocks"),
        "num_single_layers": _count(shapes, "single_blocks"),
        "attention_head_dim": head_size,
        "num_attention_heads": hidden // head_size,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
        "axes_dims_rope": [16, 56, 56],
    }


def _sd3(shapes: Shapes) -> dict[str, Any]:
    hidden, in_channels, patch_size = shapes["x_embedder.proj.weight"][:3]
    pattern = re.compile(r"joint_blocks\.(\d+)\.x_block\.attn2\.")
    dual = sorted({int(match[1]) for name in shapes if (match := pattern.match(name))})
    config: dict[str, Any] = {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 128,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "out_channels": shapes["final_layer.linear.weight"][0] // patch_size**2,
        "num_layers": _count(shapes, "joint_blocks"),
        "attention_head_dim": 64,
        "num_attention_heads": hidden // 64,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "caption_projection_dim": hidden,
        "pooled_projection_dim": shapes["y_embedder.mlp.0.weight"][1],
        "pos_embed_max_size": math.isqrt(shapes["pos_embed"][-2]),
    }
    if "joint_blocks.0.x_block.attn.ln_q.weight" in shapes:
        config["qk_norm"] = "rms_norm"
    if dual:
        config["dual_attention_layers"] = dual
    return config
