# SPDX-License-Identifier: Apache-2.0
"""Names of Flux and Stable Diffusion 3 tensors in GGUF files: those of the models' own repositories, without a prefix.

Checked against:

- stable-diffusion.cpp (August 2026): the blocks that `src/model/diffusion/flux.hpp` and `mmdit.hpp` declare, and the
  diffusers names that `src/name_conversion.cpp` translates to them;
- ComfyUI-GGUF: the keys by which `tools/convert.py` tells the architectures `flux` and `sd3`, and the architecture
  names that `loader.py` accepts;
- diffusers: `convert_flux_transformer_checkpoint_to_diffusers` and `convert_sd3_transformer_checkpoint_to_diffusers`
  turn what is exported back into the model (a test does so).

Projections that diffusers keeps apart are one tensor there, their rows one after the other; and the two halves of the
last modulation are in the other order (shift, scale).
"""

import dataclasses
import re
from collections.abc import Collection, Iterator

import torch


CONFIG_KEY = "diffusers_ternary.config"
"""Field of our own files that holds config.json."""

ARCHITECTURES = {"FluxTransformer2DModel": "flux", "SD3Transformer2DModel": "sd3"}
# A tensor that no other architecture has.
_TELLTALES = {"flux": "double_blocks.0.img_attn.proj.weight", "sd3": "joint_blocks.0.x_block.attn.qkv.weight"}


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file and what it is in diffusers.

    Args:
        name (`str`): in the file.
        parts (`tuple[str, ...]`): in diffusers; their rows follow each other.
        swapped (`bool`): whether the two halves of the rows change places.
    """

    name: str
    parts: tuple[str, ...]
    swapped: bool = False

    def join(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """The file's tensor, of those of diffusers."""
        joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return _swap(joined) if self.swapped else joined

    def split(self, tensor: torch.Tensor, rows: list[int]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of diffusers, which have these numbers of rows."""
        tensor = _swap(tensor) if self.swapped else tensor
        yield from zip(self.parts, tensor.split(rows), strict=True)


def _swap(tensor: torch.Tensor) -> torch.Tensor:
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


def architecture_of(names: Collection[str]) -> str | None:
    """The architecture of a file that does not state it, by its tensors."""
    return next((name for name, telltale in _TELLTALES.items() if telltale in names), None)


def gguf_tensors(class_name: str, names: Collection[str]) -> list[GgufTensor]:
    """The tensors of a GGUF file for a diffusers model.

    Args:
        class_name (`str`): of the model.
        names (`Collection[str]`): its state dict's keys.

    Raises:
        ValueError: if the architecture has no such form, or a tensor has no name there.
    """
    if class_name not in ARCHITECTURES:
        raise ValueError(
            f"{class_name} has no GGUF form here: the names of {', '.join(ARCHITECTURES)} are known. Share the packed "
            "folder instead."
        )
    modules = _flux_modules(names) if ARCHITECTURES[class_name] == "flux" else _sd3_modules(names)
    tensors = [tensor for module in modules for tensor in _leaves(*module) if set(tensor.parts) <= set(names)]
    uncovered = set(names) - {part for tensor in tensors for part in tensor.parts}
    if uncovered:
        raise ValueError(
            f"{len(uncovered)} tensors of this {class_name} have no name in GGUF files ({min(uncovered)}). It is a "
            "variant of the architecture that other programs do not know."
        )
    return tensors


_Module = tuple[str, tuple[str, ...], bool]


def _leaves(name: str, parts: tuple[str, ...], swapped: bool) -> Iterator[GgufTensor]:
    if name == "pos_embed":
        yield GgufTensor(name, parts)
    elif name.endswith("_norm.scale"):
        yield GgufTensor(name, tuple(f"{part}.weight" for part in parts))
    else:
        for leaf in ("weight", "bias"):
            yield GgufTensor(f"{name}.{leaf}", tuple(f"{part}.{leaf}" for part in parts), swapped)


def _count(names: Collection[str], prefix: str) -> int:
    numbers = [int(match[1]) for name in names if (match := re.match(rf"{prefix}\.(\d+)\.", name))]
    return max(numbers, default=-1) + 1


def _flux_modules(names: Collection[str]) -> Iterator[_Module]:
    yield "img_in", ("x_embedder",), False
    yield "txt_in", ("context_embedder",), False
    for theirs, ours in (("time_in", "timestep"), ("vector_in", "text"), ("guidance_in", "guidance")):
        yield f"{theirs}.in_layer", (f"time_text_embed.{ours}_embedder.linear_1",), False
        yield f"{theirs}.out_layer", (f"time_text_embed.{ours}_embedder.linear_2",), False
    for index in range(_count(names, "transformer_blocks")):
        theirs, ours = f"double_blocks.{index}", f"transformer_blocks.{index}"
        for stream, qkv, out, norm, suffix in (
            ("img", ("to_q", "to_k", "to_v"), "to_out.0", "norm", ""),
            ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "norm_added", "_context"),
        ):
            yield f"{theirs}.{stream}_mod.lin", (f"{ours}.norm1{suffix}.linear",), False
            yield f"{theirs}.{stream}_attn.qkv", tuple(f"{ours}.attn.{part}" for part in qkv), False
            yield f"{theirs}.{stream}_attn.norm.query_norm.scale", (f"{ours}.attn.{norm}_q",), False
            yield f"{theirs}.{stream}_attn.norm.key_norm.scale", (f"{ours}.attn.{norm}_k",), False
            yield f"{theirs}.{stream}_attn.proj", (f"{ours}.attn.{out}",), False
            yield f"{theirs}.{stream}_mlp.0", (f"{ours}.ff{suffix}.net.0.proj",), False
            yield f"{theirs}.{stream}_mlp.2", (f"{ours}.ff{suffix}.net.2",), False
    for index in range(_count(names, "single_transformer_blocks")):
        theirs, ours = f"single_blocks.{index}", f"single_transformer_blocks.{index}"
        joined = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        yield f"{theirs}.modulation.lin", (f"{ours}.norm.linear",), False
        yield f"{theirs}.linear1", tuple(f"{ours}.{part}" for part in joined), False
        yield f"{theirs}.norm.query_norm.scale", (f"{ours}.attn.norm_q",), False
        yield f"{theirs}.norm.key_norm.scale", (f"{ours}.attn.norm_k",), False
        yield f"{theirs}.linear2", (f"{ours}.proj_out",), False
    yield "final_layer.linear", ("proj_out",), False
    yield "final_layer.adaLN_modulation.1", ("norm_out.linear",), True


def _sd3_modules(names: Collection[str]) -> Iterator[_Module]:
    yield "pos_embed", ("pos_embed.pos_embed",), False
    yield "x_embedder.proj", ("pos_embed.proj",), False
    yield "context_embedder", ("context_embedder",), False
    for theirs, ours in (("t_embedder", "timestep"), ("y_embedder", "text")):
        yield f"{theirs}.mlp.0", (f"time_text_embed.{ours}_embedder.linear_1",), False
        yield f"{theirs}.mlp.2", (f"time_text_embed.{ours}_embedder.linear_2",), False
    layers = _count(names, "transformer_blocks")
    for index in range(layers):
        ours = f"transformer_blocks.{index}"
        image, text = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
        for block, attn, qkv, out, norm, suffix in (
            ("x_block", "attn", image, "to_out.0", "norm", ""),
            ("x_block", "attn2", image, "to_out.0", "norm", None),
            ("context_block", "attn", text, "to_add_out", "norm_added", "_context"),
        ):
            theirs = f"joint_blocks.{index}.{block}"
            yield f"{theirs}.{attn}.qkv", tuple(f"{ours}.{attn}.{part}" for part in qkv), False
            yield f"{theirs}.{attn}.ln_q", (f"{ours}.{attn}.{norm}_q",), False
            yield f"{theirs}.{attn}.ln_k", (f"{ours}.{attn}.{norm}_k",), False
            yield f"{theirs}.{attn}.proj", (f"{ours}.{attn}.{out}",), False
            if suffix is not None:
                # The last block discards its context, so its modulation is that of a final layer.
                last = suffix == "_context" and index == layers - 1
                yield f"{theirs}.adaLN_modulation.1", (f"{ours}.norm1{suffix}.linear",), last
                yield f"{theirs}.mlp.fc1", (f"{ours}.ff{suffix}.net.0.proj",), False
                yield f"{theirs}.mlp.fc2", (f"{ours}.ff{suffix}.net.2",), False
    yield "final_layer.linear", ("proj_out",), False
    yield "final_layer.adaLN_modulation.1", ("norm_out.linear",), True
