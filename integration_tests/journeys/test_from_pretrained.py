# SPDX-License-Identifier: Apache-2.0
"""The options of `from_pretrained`, `from_single_file` and `save_pretrained`: every way gives the same bits."""

import copy
import json
import pickle

import pytest
import torch
from diffusers import AutoModel, FluxTransformer2DModel, SD3Transformer2DModel, ZImageTransformer2DModel
from safetensors.torch import save_file

from diffusers_ternary import TernaryConfig, quantize
from diffusers_ternary.backend import packed_layers
from diffusers_ternary.layers import Int8Linear, TernaryLinear
from integration_tests.support import denoisers
from integration_tests.support.checkpoints import read_file, to_original_z_image
from integration_tests.support.denoisers import predict


CONFIG = TernaryConfig(overrides={"*.norm1.linear": "int8"})
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def float_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("float")
    torch.manual_seed(0)
    denoisers.flux().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def packed_folder(float_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    FluxTransformer2DModel.from_pretrained(float_folder, quantization_config=CONFIG).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(packed_folder):
    """The state dict that every way of loading must give."""
    return FluxTransformer2DModel.from_pretrained(packed_folder).state_dict()


def assert_same(state: dict, expected: dict) -> None:
    assert state.keys() == expected.keys()
    different = [name for name in state if not torch.equal(state[name].cpu(), expected[name])]
    assert different == []
    assert all(state[name].dtype == expected[name].dtype for name in state)


class TestOnTheFly:
    def test_equals_quantize_in_memory(self, float_folder, expected):
        model = quantize(FluxTransformer2DModel.from_pretrained(float_folder), CONFIG)
        assert_same(model.state_dict(), expected)

    def test_kinds(self, packed_folder):
        model = FluxTransformer2DModel.from_pretrained(packed_folder)
        layers = packed_layers(model)
        assert {name for name, layer in layers.items() if isinstance(layer, Int8Linear)} == {
            "transformer_blocks.0.norm1.linear"
        }
        assert sum(isinstance(layer, TernaryLinear) for layer in layers.values()) == 19
        assert type(model.x_embedder) is torch.nn.Linear
        assert model.is_quantized
        assert not model.training
        assert not any(layer.training for layer in layers.values())

    def test_sharded_float_checkpoint(self, float_folder, expected, tmp_path):
        FluxTransformer2DModel.from_pretrained(float_folder).save_pretrained(tmp_path, max_shard_size="2MB")
        assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 3
        assert_same(
            FluxTransformer2DModel.from_pretrained(tmp_path, quantization_config=CONFIG).state_dict(), expected
        )

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_16_bit_models_are_packed_from_the_files_precision(self, float_folder, expected, dtype):
        model = FluxTransformer2DModel.from_pretrained(float_folder, quantization_config=CONFIG, torch_dtype=dtype)
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                assert torch.equal(tensor, expected[name].to(dtype)), name
            else:
                assert torch.equal(tensor, expected[name]), name

    def test_compute_dtype_is_the_default_dtype(self, float_folder, tmp_path):
        config = TernaryConfig(compute_dtype="bfloat16")
        model = FluxTransformer2DModel.from_pretrained(float_folder, quantization_config=config)
        assert model.dtype == torch.bfloat16
        assert model.transformer_blocks[0].attn.to_q.compute_dtype == torch.bfloat16
        model.save_pretrained(tmp_path)
        assert FluxTransformer2DModel.from_pretrained(tmp_path).dtype == torch.bfloat16


class TestReload:
    def test_a_save_is_reproducible(self, packed_folder, tmp_path):
        FluxTransformer2DModel.from_pretrained(packed_folder).save_pretrained(tmp_path)
        again, metadata = read_file(tmp_path / WEIGHTS)
        tensors, expected_metadata = read_file(packed_folder / WEIGHTS)
        assert metadata == expected_metadata
        assert_same(again, tensors)

    def test_sharded(self, packed_folder, expected, tmp_path):
        FluxTransformer2DModel.from_pretrained(packed_folder).save_pretrained(tmp_path, max_shard_size="200KB")
        shards = sorted(tmp_path.glob("*-of-*.safetensors"))
        assert len(shards) > 3
        layouts = {read_file(shard)[1]["diffusers_ternary"] for shard in shards}
        assert len(layouts) == 1, "every shard carries the whole layout"
        assert_same(FluxTransformer2DModel.from_pretrained(tmp_path).state_dict(), expected)

    def test_variant(self, packed_folder, expected, tmp_path):
        FluxTransformer2DModel.from_pretrained(packed_folder).save_pretrained(tmp_path, variant="ternary")
        assert (tmp_path / "diffusion_pytorch_model.ternary.safetensors").exists()
        assert not (tmp_path / WEIGHTS).exists()
        assert_same(FluxTransformer2DModel.from_pretrained(tmp_path, variant="ternary").state_dict(), expected)

    @pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
    def test_device_map(self, packed_folder, expected, device_map, float_folder):
        model = FluxTransformer2DModel.from_pretrained(packed_folder, device_map=device_map)
        assert_same(model.state_dict(), expected)
        on_the_fly = FluxTransformer2DModel.from_pretrained(
            float_folder, quantization_config=CONFIG, device_map=device_map
        )
        assert_same(on_the_fly.state_dict(), expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, None])
    def test_torch_dtype(self, packed_folder, expected, dtype):
        model = FluxTransformer2DModel.from_pretrained(packed_folder, torch_dtype=dtype)
        wanted = dtype or torch.float32
        assert model.dtype == wanted
        for name, tensor in model.state_dict().items():
            assert tensor.dtype == (wanted if tensor.is_floating_point() else expected[name].dtype), name
        outputs = predict(model)
        assert outputs.dtype == wanted
        assert torch.isfinite(outputs).all()

    def test_auto_model(self, packed_folder, expected):
        model = AutoModel.from_pretrained(str(packed_folder))
        assert type(model) is FluxTransformer2DModel
        assert_same(model.state_dict(), expected)

    def test_parallel_loading(self, packed_folder, expected, tmp_path, monkeypatch):
        FluxTransformer2DModel.from_pretrained(packed_folder).save_pretrained(tmp_path / "q", max_shard_size="200KB")
        monkeypatch.setattr("diffusers.models.modeling_utils.HF_ENABLE_PARALLEL_LOADING", True)
        model = FluxTransformer2DModel.from_pretrained(tmp_path / "q", device_map="cpu")
        assert_same(model.state_dict(), expected)

    def test_low_cpu_mem_usage_false_is_refused(self, packed_folder):
        with pytest.raises((ValueError, NotImplementedError), match="low_cpu_mem_usage"):
            FluxTransformer2DModel.from_pretrained(packed_folder, low_cpu_mem_usage=False)

    @pytest.mark.parametrize("group_size", [None, 1, 7, 50, 128, 100000])
    @pytest.mark.parametrize("scales", ["group", "double"])
    def test_any_group_size(self, group_size, scales, tmp_path):
        torch.manual_seed(0)
        model = quantize(denoisers.pixart(), TernaryConfig(group_size=group_size, scale_layout=scales))
        model.save_pretrained(tmp_path)
        assert_same(type(model).from_pretrained(tmp_path).state_dict(), model.state_dict())

    def test_rows_whose_length_4_and_5_do_not_divide(self, tmp_path):
        torch.manual_seed(0)
        model = quantize(
            SD3Transformer2DModel(
                sample_size=8,
                patch_size=1,
                in_channels=4,
                num_layers=1,
                attention_head_dim=12,
                num_attention_heads=3,
                caption_projection_dim=36,
                joint_attention_dim=31,
                pooled_projection_dim=33,
                out_channels=4,
                pos_embed_max_size=16,
            ),
            TernaryConfig(overrides={"*": "ternary"}),
        )
        layers = packed_layers(model).values()
        assert len({layer.spec.in_features % 4 for layer in layers}) > 2
        assert len({layer.spec.weights % 5 for layer in layers}) > 2
        model.save_pretrained(tmp_path)
        assert_same(SD3Transformer2DModel.from_pretrained(tmp_path).state_dict(), model.state_dict())


class TestCopies:
    @pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copied_models_run_and_save(self, packed_folder, expected, how, tmp_path):
        model = FluxTransformer2DModel.from_pretrained(packed_folder)
        copied = how(model)
        del model
        assert_same(copied.state_dict(), expected)
        assert torch.isfinite(predict(copied)).all()
        copied.save_pretrained(tmp_path)
        assert_same(FluxTransformer2DModel.from_pretrained(tmp_path).state_dict(), expected)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_compiles_into_one_graph(self, packed_folder, dtype):
        model = FluxTransformer2DModel.from_pretrained(packed_folder, torch_dtype=dtype)
        eager = predict(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(predict(compiled, dtype), eager, rtol=2e-2, atol=2e-2)

    def test_float32_models_take_16_bit_inputs(self, packed_folder):
        model = FluxTransformer2DModel.from_pretrained(packed_folder)
        outputs = predict(model, torch.bfloat16)
        assert outputs.dtype == torch.float32
        assert torch.isfinite(outputs).all()


@pytest.fixture(scope="module")
def z_image(tmp_path_factory):
    """A float folder in the diffusers layout, and the same weights in the layout of the original repository."""
    folder = tmp_path_factory.mktemp("z_image")
    torch.manual_seed(0)
    denoisers.z_image().save_pretrained(folder)
    tensors, _ = read_file(folder / WEIGHTS)
    save_file(to_original_z_image(tensors), folder / "original.safetensors", {"format": "pt"})
    return folder


class TestSingleFile:
    """`from_single_file` reads float checkpoints, in the diffusers layout and in the original one."""

    def test_diffusers_layout(self, float_folder, expected):
        model = FluxTransformer2DModel.from_single_file(
            str(float_folder / WEIGHTS), config=str(float_folder), quantization_config=CONFIG
        )
        assert_same(model.state_dict(), expected)

    def test_original_layout(self, z_image, tmp_path):
        reference = ZImageTransformer2DModel.from_pretrained(z_image, quantization_config=TernaryConfig())
        model = ZImageTransformer2DModel.from_single_file(
            str(z_image / "original.safetensors"), config=str(z_image), quantization_config=TernaryConfig()
        )
        assert packed_layers(model)
        assert_same(model.state_dict(), reference.state_dict())
        model.save_pretrained(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text())
        assert written["quantization_config"]["quant_method"] == "diffusers_ternary"
        assert_same(ZImageTransformer2DModel.from_pretrained(tmp_path).state_dict(), reference.state_dict())

    def test_packed_files_are_refused(self, packed_folder, float_folder):
        with pytest.raises(ValueError, match=r"packed already.*from_pretrained"):
            FluxTransformer2DModel.from_single_file(
                str(packed_folder / WEIGHTS), config=str(float_folder), quantization_config=CONFIG
            )


def test_rotation_and_low_rank_are_saved_and_loaded(float_folder, tmp_path):
    config = TernaryConfig(group_size=8, hadamard=8, rank=2)
    first = FluxTransformer2DModel.from_pretrained(float_folder, quantization_config=config)
    first.save_pretrained(tmp_path)
    second = FluxTransformer2DModel.from_pretrained(tmp_path)
    specs = [layer.spec for layer in packed_layers(second).values()]
    assert {(spec.hadamard, spec.rank) for spec in specs} == {(8, 2)}
    assert_same(second.state_dict(), first.state_dict())
    torch.testing.assert_close(
        predict(second), predict(first), atol=1e-5, rtol=0
    )  # mapped files are aligned differently
    stored, _ = read_file(tmp_path / WEIGHTS)
    for name, tensor in stored.items():
        if name.endswith(("low_rank_up", "low_rank_down")):
            assert tensor.dtype == torch.float16
