# SPDX-License-Identifier: Apache-2.0
"""Module names of mflux (0.24) for the denoisers of diffusers that it runs: all but these are the same."""

import re


# (pattern, replacement) of module paths, the first that matches counts.
_RENAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "FluxTransformer2DModel": (
        (r"(.*\bff(?:_context)?)\.net\.0\.proj", r"\1.linear1"),
        (r"(.*\bff(?:_context)?)\.net\.2", r"\1.linear2"),
    ),
    "Flux2Transformer2DModel": (
        (r"time_guidance_embed\.timestep_embedder\.(linear_\d)", r"time_guidance_embed.\1"),
        (r"time_guidance_embed\.guidance_embedder\.(linear_\d)", r"time_guidance_embed.guidance_\1"),
        (r"(transformer_blocks\.\d+\.attn)\.to_out\.0", r"\1.to_out"),
    ),
    "Flux3Transformer2DModel": ((r"(.*\.attn)\.to_out\.0", r"\1.to_out"),),
    "ZImageTransformer2DModel": (
        (r"t_embedder\.mlp\.0", "t_embedder.linear1"),
        (r"t_embedder\.mlp\.2", "t_embedder.linear2"),
        (r"(all_final_layer\.[\w-]+\.adaLN_modulation)\.1", r"\1.0"),
    ),
    "QwenImageTransformer2DModel": (
        (r"(.*\.attn)\.to_out\.0", r"\1.attn_to_out.0"),
        (r"(.*)\.(img|txt)_mod\.1", r"\1.\2_mod_linear"),
        (r"(.*)\.(img|txt)_mlp\.net\.0\.proj", r"\1.\2_ff.mlp_in"),
        (r"(.*)\.(img|txt)_mlp\.net\.2", r"\1.\2_ff.mlp_out"),
    ),
}
CLASSES = tuple(_RENAMES)


def mflux_module(class_name: str, module: str) -> str:
    """What mflux calls a module of diffusers.

    Raises:
        ValueError: if mflux does not run the class.
    """
    if class_name not in _RENAMES:
        raise ValueError(
            f"{class_name} has no mflux form here: the names of {', '.join(CLASSES)} are known. Share the packed "
            "folder instead."
        )
    for pattern, replacement in _RENAMES[class_name]:
        renamed, count = re.subn(rf"^{pattern}$", replacement, module)
        if count:
            return renamed
    return module


def mflux_name(class_name: str, name: str) -> str:
    """What mflux calls a tensor of diffusers."""
    module, _, leaf = name.rpartition(".")
    return f"{mflux_module(class_name, module)}.{leaf}" if module else leaf
