# SPDX-License-Identifier: Apache-2.0
"""Clark-style packs of Sana: names and codes written by hand, as the pack's own loader reads them."""

from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import SanaTransformer2DModel
from safetensors.torch import load_file, save_file

from diffusers_ternary import convert
from diffusers_ternary.backend import packed_layers
from diffusers_ternary.interop.inspection import inspect_path
from diffusers_ternary.interop.sana_names import sana_config
from diffusers_ternary.layers import TernaryConv2d
from integration_tests.support import denoisers, foreign


def original_names(blocks: int) -> dict[str, tuple[str, ...]]:
    """Sana's own tensor names, and the diffusers tensors whose rows they hold."""
    names = {
        "x_embedder.proj.weight": ("patch_embed.proj.weight",),
        "x_embedder.proj.bias": ("patch_embed.proj.bias",),
        "y_embedder.y_proj.fc1.weight": ("caption_projection.linear_1.weight",),
        "y_embedder.y_proj.fc1.bias": ("caption_projection.linear_1.bias",),
        "y_embedder.y_proj.fc2.weight": ("caption_projection.linear_2.weight",),
        "y_embedder.y_proj.fc2.bias": ("caption_projection.linear_2.bias",),
        "t_embedder.mlp.0.weight": ("time_embed.emb.timestep_embedder.linear_1.weight",),
        "t_embedder.mlp.0.bias": ("time_embed.emb.timestep_embedder.linear_1.bias",),
        "t_embedder.mlp.2.weight": ("time_embed.emb.timestep_embedder.linear_2.weight",),
        "t_embedder.mlp.2.bias": ("time_embed.emb.timestep_embedder.linear_2.bias",),
        "t_block.1.weight": ("time_embed.linear.weight",),
        "t_block.1.bias": ("time_embed.linear.bias",),
        "attention_y_norm.weight": ("caption_norm.weight",),
        "final_layer.linear.weight": ("proj_out.weight",),
        "final_layer.linear.bias": ("proj_out.bias",),
        "final_layer.scale_shift_table": ("scale_shift_table",),
    }
    for index in range(blocks):
        theirs, ours = f"blocks.{index}", f"transformer_blocks.{index}"
        in_block = {
            "scale_shift_table": ("scale_shift_table",),
            "attn.qkv.weight": ("attn1.to_q.weight", "attn1.to_k.weight", "attn1.to_v.weight"),
            "attn.proj.weight": ("attn1.to_out.0.weight",),
            "attn.proj.bias": ("attn1.to_out.0.bias",),
            "cross_attn.q_linear.weight": ("attn2.to_q.weight",),
            "cross_attn.q_linear.bias": ("attn2.to_q.bias",),
            "cross_attn.kv_linear.weight": ("attn2.to_k.weight", "attn2.to_v.weight"),
            "cross_attn.kv_linear.bias": ("attn2.to_k.bias", "attn2.to_v.bias"),
            "cross_attn.proj.weight": ("attn2.to_out.0.weight",),
            "cross_attn.proj.bias": ("attn2.to_out.0.bias",),
            "mlp.inverted_conv.conv.weight": ("ff.conv_inverted.weight",),
            "mlp.inverted_conv.conv.bias": ("ff.conv_inverted.bias",),
            "mlp.depth_conv.conv.weight": ("ff.conv_depth.weight",),
            "mlp.depth_conv.conv.bias": ("ff.conv_depth.bias",),
            "mlp.point_conv.conv.weight": ("ff.conv_point.weight",),
        }
        names |= {f"{theirs}.{name}": tuple(f"{ours}.{part}" for part in parts) for name, parts in in_block.items()}
    return names


QUANTIZED = (
    "attn.qkv",
    "attn.proj",
    "cross_attn.q_linear",
    "cross_attn.kv_linear",
    "cross_attn.proj",
    "mlp.inverted_conv.conv",
    "mlp.point_conv.conv",
)


def published(file: Path, config_folder: Path) -> dict[str, torch.Tensor]:
    """Writes a pack of a small Sana; returns what its diffusers model must hold."""
    torch.manual_seed(0)
    model = denoisers.sana().bfloat16()
    model.save_config(config_folder)
    state = model.state_dict()
    pack: dict[str, torch.Tensor] = {"pos_embed": torch.zeros(1, 4, 64), "y_embedder.y_embedding": torch.zeros(3, 32)}
    expected = {}
    for seed, (name, parts) in enumerate(original_names(1).items()):
        module = name.removesuffix(".weight")
        joined = torch.cat([state[part] for part in parts])
        if module.endswith(QUANTIZED):
            matrix = joined.flatten(1)
            group_size = 32 if matrix.shape[1] % 64 else 64
            weight = foreign.random_ternary(*matrix.shape, group_size, seed=seed)
            pack |= foreign.clark(module, weight)
            joined = torch.from_numpy(weight.dense()).view(joined.shape)
        elif joined.dim() > 1 and "scale_shift" not in name:
            joined = joined.to(torch.float8_e4m3fn)
            pack[name] = joined
        else:
            pack[name] = joined
        expected |= dict(zip(parts, joined.chunk(len(parts)), strict=True))
    save_file({name: tensor.contiguous() for name, tensor in pack.items()}, file)
    return expected


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clark")
    expected = published(folder / "pack.safetensors", folder)
    return folder, expected


def test_every_weight_is_that_of_the_pack(source, tmp_path):
    folder, expected = source
    (report,) = convert(folder / "pack.safetensors", tmp_path / "out", config=folder)
    assert report.format == "Clark pack"
    model = SanaTransformer2DModel.from_pretrained(tmp_path / "out", dtype=torch.float32)
    packed = packed_layers(model)
    # qkv is three layers in diffusers, and kv two.
    assert len(packed) == 10
    assert type(packed["transformer_blocks.0.ff.conv_inverted"]) is TernaryConv2d
    model.dequantize()
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value.float()), name


def test_the_config_may_lie_beside_the_file_and_is_asked_for_otherwise(source, tmp_path):
    file = source[0] / "pack.safetensors"
    assert convert(file, tmp_path / "out", verify=False)
    (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=r"64 is of no published Sana .*--config"):
        convert(tmp_path / file.name, tmp_path / "other")


@pytest.mark.parametrize(("hidden", "heads", "cross_heads", "layers"), [(2240, 70, 20, 20), (1152, 36, 16, 28)])
def test_the_config_of_published_sizes_follows_from_shapes(hidden, heads, cross_heads, layers):
    config = {
        "in_channels": 32,
        "out_channels": 32,
        "num_attention_heads": heads,
        "attention_head_dim": hidden // heads,
        "num_layers": layers,
        "num_cross_attention_heads": cross_heads,
        "cross_attention_head_dim": hidden // cross_heads,
        "cross_attention_dim": hidden,
        "caption_channels": 2304,
        "mlp_ratio": 2.5,
        "attention_bias": False,
        "sample_size": 32,
        "patch_size": 1,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "interpolation_scale": None,
    }
    with init_empty_weights():
        state = SanaTransformer2DModel(**config).state_dict()
    shapes = {
        name: (sum(state[part].shape[0] for part in parts), *state[parts[0]].shape[1:])
        for name, parts in original_names(layers).items()
    }
    derived = sana_config(shapes, source="pack")
    assert derived == {"_class_name": "SanaTransformer2DModel", **config, "qk_norm": None}


def test_inspect(source):
    (component,) = inspect_path(source[0] / "pack.safetensors")
    assert component.format == "Clark pack"
    rows = {row.name: row for row in component.rows if row.shape is not None}
    assert rows["blocks.*.attn.qkv"].shape == (192, 64)
    assert rows["blocks.*.attn.qkv"].kind == "Clark 2-bit"
    assert len(rows) == 7


def rewritten(source: Path, target: Path, change) -> Path:
    tensors = load_file(source / "pack.safetensors")
    change(tensors)
    save_file(tensors, target)
    return target


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda tensors: tensors.pop("blocks.0.attn.qkv::scale"), "is missing"),
        (lambda tensors: tensors["blocks.0.attn.qkv::codes2b"].fill_(255), "level 3"),
        (lambda tensors: tensors.update({"blocks.0.attn.qkv::scale": torch.ones(192, 7)}), "does not divide"),
        (lambda tensors: tensors.update({"blocks.0.attn.qkv::codes2b": torch.zeros(192, 15).byte()}), "is damaged"),
        (lambda tensors: tensors.update({"blocks.0.attn.rope.weight": torch.ones(3)}), "is not a tensor of Sana"),
        (lambda tensors: tensors.pop("t_block.1.bias"), r"1 tensors \(time_embed.linear.bias\) missing"),
        (lambda tensors: tensors.update({"t_block.1.bias": torch.ones(3)}), "config belongs to another model"),
    ],
)
def test_damaged_packs(source, tmp_path, change, match):
    file = rewritten(source[0], tmp_path / "pack.safetensors", change)
    with pytest.raises(ValueError, match=match):
        convert(file, tmp_path / "out", config=source[0])
    assert [path.name for path in tmp_path.iterdir()] == ["pack.safetensors"]


def test_a_truncated_pack(source, tmp_path):
    data = (source[0] / "pack.safetensors").read_bytes()
    (tmp_path / "pack.safetensors").write_bytes(data[:-100])
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        convert(tmp_path / "pack.safetensors", tmp_path / "out", config=source[0])
