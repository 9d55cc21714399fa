# SPDX-License-Identifier: Apache-2.0
"""Names of a denoiser's tensors in GGUF files: those of the models' own repositories, without a prefix.

Checked against:

- stable-diffusion.cpp (August 2026), which ran FLUX.1, FLUX.2, Z-Image and Qwen-Image: the blocks that
  `src/model/diffusion/{flux,mmdit,z_image,qwen_image}.hpp` declare, and the diffusers names that
  `src/name_conversion.cpp` translates to them;
- ComfyUI-GGUF: the keys by which `tools/convert.py` tells the architectures, and the architecture names that
  `loader.py` accepts;
- diffusers: `convert_{flux,flux2,sd3,z_image}_transformer_checkpoint_to_diffusers` turn what is exported back into the
  model (a test does so). Qwen-Image has the names of diffusers everywhere.

Projections that diffusers keeps apart are one tensor there, their rows one after the other; and the two halves of the
last modulation are in the other order (shift, scale), but for Z-Image.
"""

import dataclasses
import re
from collections.abc import Collection, Iterator

import torch


CONFIG_KEY = "diffusers_ternary.config"
"""Field of our own files that holds config.json."""

ARCHITECTURES = {
    "FluxTransformer2DModel": "flux",
    "Flux2Transformer2DModel": "flux",
    "SD3Transformer2DModel": "sd3",
    "ZImageTransformer2DModel": "lumina2",
    "QwenImageTransformer2DModel": "qwen_image",
}
# A tensor that no other architecture has.
_TELLTALES = {
    "flux": "double_blocks.0.img_attn.proj.weight",
    "sd3": "joint_blocks.0.x_block.attn.qkv.weight",
    "lumina2": "context_refiner.0.attention.qkv.weight",
    "qwen_image": "transformer_blocks.0.img_mod.1.weight",
}
# A line for each module: its name in the file, then its parts in diffusers. N: the number of a block.
_DOUBLE_ATTENTION = """
double_blocks.N.img_attn.qkv transformer_blocks.N.attn.to_q transformer_blocks.N.attn.to_k \
    transformer_blocks.N.attn.to_v
double_blocks.N.img_attn.norm.query_norm.scale transformer_blocks.N.attn.norm_q.weight
double_blocks.N.img_attn.norm.key_norm.scale transformer_blocks.N.attn.norm_k.weight
double_blocks.N.img_attn.proj transformer_blocks.N.attn.to_out.0
double_blocks.N.txt_attn.qkv transformer_blocks.N.attn.add_q_proj transformer_blocks.N.attn.add_k_proj \
    transformer_blocks.N.attn.add_v_proj
double_blocks.N.txt_attn.norm.query_norm.scale transformer_blocks.N.attn.norm_added_q.weight
double_blocks.N.txt_attn.norm.key_norm.scale transformer_blocks.N.attn.norm_added_k.weight
double_blocks.N.txt_attn.proj transformer_blocks.N.attn.to_add_out
single_blocks.N.norm.query_norm.scale single_transformer_blocks.N.attn.norm_q.weight
single_blocks.N.norm.key_norm.scale single_transformer_blocks.N.attn.norm_k.weight
img_in x_embedder
txt_in context_embedder
final_layer.linear proj_out
final_layer.adaLN_modulation.1 norm_out.linear
"""
_FLUX = f"""{_DOUBLE_ATTENTION}
time_in.in_layer time_text_embed.timestep_embedder.linear_1
time_in.out_layer time_text_embed.timestep_embedder.linear_2
vector_in.in_layer time_text_embed.text_embedder.linear_1
vector_in.out_layer time_text_embed.text_embedder.linear_2
guidance_in.in_layer time_text_embed.guidance_embedder.linear_1
guidance_in.out_layer time_text_embed.guidance_embedder.linear_2
double_blocks.N.img_mod.lin transformer_blocks.N.norm1.linear
double_blocks.N.img_mlp.0 transformer_blocks.N.ff.net.0.proj
double_blocks.N.img_mlp.2 transformer_blocks.N.ff.net.2
double_blocks.N.txt_mod.lin transformer_blocks.N.norm1_context.linear
double_blocks.N.txt_mlp.0 transformer_blocks.N.ff_context.net.0.proj
double_blocks.N.txt_mlp.2 transformer_blocks.N.ff_context.net.2
single_blocks.N.modulation.lin single_transformer_blocks.N.norm.linear
single_blocks.N.linear1 single_transformer_blocks.N.attn.to_q single_transformer_blocks.N.attn.to_k \
    single_transformer_blocks.N.attn.to_v single_transformer_blocks.N.proj_mlp
single_blocks.N.linear2 single_transformer_blocks.N.proj_out
"""
_FLUX2 = f"""{_DOUBLE_ATTENTION}
time_in.in_layer time_guidance_embed.timestep_embedder.linear_1
time_in.out_layer time_guidance_embed.timestep_embedder.linear_2
guidance_in.in_layer time_guidance_embed.guidance_embedder.linear_1
guidance_in.out_layer time_guidance_embed.guidance_embedder.linear_2
double_stream_modulation_img.lin double_stream_modulation_img.linear
double_stream_modulation_txt.lin double_stream_modulation_txt.linear
single_stream_modulation.lin single_stream_modulation.linear
double_blocks.N.img_mlp.0 transformer_blocks.N.ff.linear_in
double_blocks.N.img_mlp.2 transformer_blocks.N.ff.linear_out
double_blocks.N.txt_mlp.0 transformer_blocks.N.ff_context.linear_in
double_blocks.N.txt_mlp.2 transformer_blocks.N.ff_context.linear_out
single_blocks.N.linear1 single_transformer_blocks.N.attn.to_qkv_mlp_proj
single_blocks.N.linear2 single_transformer_blocks.N.attn.to_out
"""
_SD3 = """
pos_embed pos_embed.pos_embed
x_embedder.proj pos_embed.proj
context_embedder context_embedder
t_embedder.mlp.0 time_text_embed.timestep_embedder.linear_1
t_embedder.mlp.2 time_text_embed.timestep_embedder.linear_2
y_embedder.mlp.0 time_text_embed.text_embedder.linear_1
y_embedder.mlp.2 time_text_embed.text_embedder.linear_2
joint_blocks.N.x_block.attn.qkv transformer_blocks.N.attn.to_q transformer_blocks.N.attn.to_k \
    transformer_blocks.N.attn.to_v
joint_blocks.N.x_block.attn.ln_q transformer_blocks.N.attn.norm_q
joint_blocks.N.x_block.attn.ln_k transformer_blocks.N.attn.norm_k
joint_blocks.N.x_block.attn.proj transformer_blocks.N.attn.to_out.0
joint_blocks.N.x_block.attn2.qkv transformer_blocks.N.attn2.to_q transformer_blocks.N.attn2.to_k \
    transformer_blocks.N.attn2.to_v
joint_blocks.N.x_block.attn2.ln_q transformer_blocks.N.attn2.norm_q
joint_blocks.N.x_block.attn2.ln_k transformer_blocks.N.attn2.norm_k
joint_blocks.N.x_block.attn2.proj transformer_blocks.N.attn2.to_out.0
joint_blocks.N.x_block.adaLN_modulation.1 transformer_blocks.N.norm1.linear
joint_blocks.N.x_block.mlp.fc1 transformer_blocks.N.ff.net.0.proj
joint_blocks.N.x_block.mlp.fc2 transformer_blocks.N.ff.net.2
joint_blocks.N.context_block.attn.qkv transformer_blocks.N.attn.add_q_proj transformer_blocks.N.attn.add_k_proj \
    transformer_blocks.N.attn.add_v_proj
joint_blocks.N.context_block.attn.ln_q transformer_blocks.N.attn.norm_added_q
joint_blocks.N.context_block.attn.ln_k transformer_blocks.N.attn.norm_added_k
joint_blocks.N.context_block.attn.proj transformer_blocks.N.attn.to_add_out
joint_blocks.N.context_block.adaLN_modulation.1 transformer_blocks.N.norm1_context.linear
joint_blocks.N.context_block.mlp.fc1 transformer_blocks.N.ff_context.net.0.proj
joint_blocks.N.context_block.mlp.fc2 transformer_blocks.N.ff_context.net.2
final_layer.linear proj_out
final_layer.adaLN_modulation.1 norm_out.linear
"""
_Z_IMAGE_BLOCK = """
layers.N.attention.qkv layers.N.attention.to_q layers.N.attention.to_k layers.N.attention.to_v
layers.N.attention.q_norm layers.N.attention.norm_q
layers.N.attention.k_norm layers.N.attention.norm_k
layers.N.attention.out layers.N.attention.to_out.0
layers.N.feed_forward.w1 layers.N.feed_forward.w1
layers.N.feed_forward.w2 layers.N.feed_forward.w2
layers.N.feed_forward.w3 layers.N.feed_forward.w3
layers.N.attention_norm1 layers.N.attention_norm1
layers.N.attention_norm2 layers.N.attention_norm2
layers.N.ffn_norm1 layers.N.ffn_norm1
layers.N.ffn_norm2 layers.N.ffn_norm2
layers.N.adaLN_modulation.0 layers.N.adaLN_modulation.0
"""
_Z_IMAGE = f"""{_Z_IMAGE_BLOCK}
{_Z_IMAGE_BLOCK.replace("layers", "noise_refiner")}
{_Z_IMAGE_BLOCK.replace("layers", "context_refiner")}
x_pad_token x_pad_token
cap_pad_token cap_pad_token
x_embedder all_x_embedder.2-1
cap_embedder.0 cap_embedder.0
cap_embedder.1 cap_embedder.1
t_embedder.mlp.0 t_embedder.mlp.0
t_embedder.mlp.2 t_embedder.mlp.2
final_layer.linear all_final_layer.2-1.linear
final_layer.adaLN_modulation.1 all_final_layer.2-1.adaLN_modulation.1
"""
_TABLES = {
    "FluxTransformer2DModel": _FLUX,
    "Flux2Transformer2DModel": _FLUX2,
    "SD3Transformer2DModel": _SD3,
    "ZImageTransformer2DModel": _Z_IMAGE,
}


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
    if class_name not in _TABLES:
        return [GgufTensor(name, (name,)) for name in sorted(names)]
    known = set(names)
    tensors = [tensor for tensor in _named(class_name, known) if known.issuperset(tensor.parts)]
    uncovered = known - {part for tensor in tensors for part in tensor.parts}
    if uncovered:
        raise ValueError(
            f"{len(uncovered)} tensors of this {class_name} have no name in GGUF files ({min(uncovered)}). It is a "
            "variant of the architecture that other programs do not know."
        )
    return tensors


def _named(class_name: str, names: set[str]) -> Iterator[GgufTensor]:
    """What the table of a class gives for models of any variant: also tensors that this one does not have."""
    last = _blocks(names, "transformer_blocks") - 1
    # The last block of SD3 discards its context, so its modulation is that of a final layer.
    swapped = {"final_layer.adaLN_modulation.1", f"joint_blocks.{last}.context_block.adaLN_modulation.1"}
    if class_name == "ZImageTransformer2DModel":
        swapped = set()
    for line in _TABLES[class_name].splitlines():
        for module, *parts in _numbered(line.split(), names):
            if parts[0] in names:  # a tensor that is not in a module of weight and bias
                yield GgufTensor(module, tuple(parts))
                continue
            for leaf in ("weight", "bias"):
                theirs = tuple(f"{part}.{leaf}" for part in parts)
                yield GgufTensor(f"{module}.{leaf}", theirs, module in swapped)


def _numbered(row: list[str], names: set[str]) -> Iterator[list[str]]:
    """A row of a table, once for every block of the model; an empty one not at all."""
    if not row:
        return
    prefix, several, _ = row[1].partition(".N.")
    for number in range(_blocks(names, prefix) if several else 1):
        yield [name.replace(".N.", f".{number}.") for name in row]


def _blocks(names: Collection[str], prefix: str) -> int:
    numbers = [int(match[1]) for name in names if (match := re.match(rf"{prefix}\.(\d+)\.", name))]
    return max(numbers, default=-1) + 1
