# SPDX-License-Identifier: Apache-2.0
"""Text encoders through transformers: on the fly, in memory, saved, reloaded in a fresh process."""

import copy
import json
import pickle

import pytest
import torch
from transformers import AutoModel, PreTrainedModel

from diffusers_ternary import TernaryConfig, quantize
from diffusers_ternary.backend import packed_layers
from diffusers_ternary.layers import TernaryLinear
from integration_tests.support import text_encoders
from integration_tests.support.checkpoints import read_file
from integration_tests.support.fresh_process import run_python


ENCODERS = {
    "clip": text_encoders.clip,
    "clip_with_projection": text_encoders.clip_with_projection,
    "t5": text_encoders.t5,
    "gemma": text_encoders.gemma,
    "qwen3": text_encoders.qwen3,
    "qwen_vl": text_encoders.qwen_vl,
}
CONFIG = TernaryConfig(group_size=8, activation_dtype="none")


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return ENCODERS[name]().eval()


@torch.no_grad()
def run(model: PreTrainedModel) -> torch.Tensor:
    for parameter in model.parameters():  # of mapped files; see support.pipelines.realign
        parameter.data = parameter.data.clone()
    return model(input_ids=torch.tensor([[5, 17, 33, 2, 9]]))[0].float()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every encoder as a float folder and, quantized on the fly, as a packed one, with its outputs."""
    root = tmp_path_factory.mktemp("encoders")
    outputs = {}
    for name in ENCODERS:
        build(name).save_pretrained(root / f"{name}-float")
        model = type(build(name)).from_pretrained(root / f"{name}-float", quantization_config=CONFIG)
        outputs[name] = run(model)
        model.save_pretrained(root / name)
    return root, outputs


@pytest.fixture(scope="module")
def reloaded(folders):
    return run_python(
        """
        import json, sys
        import torch, transformers, diffusers_ternary

        torch.set_num_threads(1)
        results = {}
        for name in sys.argv[2:]:
            folder = f"{sys.argv[1]}/{name}"
            architecture = json.load(open(f"{folder}/config.json"))["architectures"][0]
            model = getattr(transformers, architecture).from_pretrained(folder)
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
            with torch.no_grad():
                outputs = model(input_ids=torch.tensor([[5, 17, 33, 2, 9]]))[0]
            results[name] = outputs.float().flatten().tolist()
        print(json.dumps(results))
        """,
        folders[0],
        *ENCODERS,
    )


@pytest.mark.parametrize("name", ENCODERS)
class TestEveryEncoder:
    def test_a_fresh_process_encodes_the_same(self, name, folders, reloaded):
        assert reloaded[name] == folders[1][name].flatten().tolist()

    def test_in_memory_gives_what_on_the_fly_gives(self, name, folders):
        model = quantize(type(build(name)).from_pretrained(folders[0] / f"{name}-float"), CONFIG)
        assert torch.equal(run(model), folders[1][name])

    def test_rounding_changed_the_outputs(self, name, folders):
        assert not torch.equal(run(build(name)), folders[1][name])

    def test_attributes(self, name, folders):
        model = type(build(name)).from_pretrained(folders[0] / name)
        assert json.loads((folders[0] / name / "config.json").read_text())["quantization_config"]["group_size"] == 8
        assert model.hf_quantizer is not None
        assert model.is_quantized
        assert packed_layers(model)
        embedding = model.get_input_embeddings()
        assert isinstance(embedding, torch.nn.Embedding)

    def test_saving_again_gives_the_same_file(self, name, folders, tmp_path):
        type(build(name)).from_pretrained(folders[0] / name).save_pretrained(tmp_path)
        again, metadata = read_file(tmp_path / "model.safetensors")
        tensors, expected_metadata = read_file(folders[0] / name / "model.safetensors")
        assert metadata == expected_metadata
        assert again.keys() == tensors.keys()
        assert all(torch.equal(again[key], tensors[key]) for key in tensors)

    def test_sharded(self, name, folders, tmp_path):
        type(build(name)).from_pretrained(folders[0] / name).save_pretrained(tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 1
        assert torch.equal(run(type(build(name)).from_pretrained(tmp_path)), folders[1][name])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_16_bits(self, name, folders, dtype, tmp_path):
        cls = type(build(name))
        model = cls.from_pretrained(folders[0] / f"{name}-float", quantization_config=CONFIG, dtype=dtype)
        assert model.dtype == dtype
        outputs = run(model)
        assert torch.isfinite(outputs).all()
        model.save_pretrained(tmp_path)
        again = cls.from_pretrained(tmp_path, dtype=dtype)
        assert again.dtype == dtype
        assert torch.equal(run(again), outputs)
        state, reference = again.state_dict(), model.state_dict()
        assert all(torch.equal(state[key], reference[key]) for key in reference)

    def test_dequantize(self, name, folders, tmp_path):
        model = type(build(name)).from_pretrained(folders[0] / name)
        model.dequantize()
        assert not packed_layers(model)
        torch.testing.assert_close(run(model), folders[1][name], rtol=1e-4, atol=1e-4)
        model.save_pretrained(tmp_path)
        assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
        assert torch.equal(run(type(model).from_pretrained(tmp_path)), run(model))

    @pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies(self, name, folders, how, tmp_path):
        copied = how(type(build(name)).from_pretrained(folders[0] / name))
        assert torch.equal(run(copied), folders[1][name])
        copied.save_pretrained(tmp_path)
        assert torch.equal(run(type(copied).from_pretrained(tmp_path)), folders[1][name])

    def test_parameters_are_frozen(self, name, folders):
        for folder in (folders[0] / name, folders[0] / f"{name}-float"):
            config = None if folder.name == name else CONFIG
            model = type(build(name)).from_pretrained(folder, quantization_config=config)
            for layer in packed_layers(model).values():
                assert not any(getattr(layer, part).requires_grad for part in layer.spec.memory_tensors())


def test_auto_model(folders):
    assert torch.equal(run(AutoModel.from_pretrained(folders[0] / "qwen3")), folders[1]["qwen3"])


def test_t5_keeps_nothing_back_and_computes_in_the_right_dtype(folders):
    """T5 wants `wo` in float32 and casts activations to its dtype unless that is int8: packed, both are harmless."""
    model = type(build("t5")).from_pretrained(
        folders[0] / "t5-float", quantization_config=CONFIG, dtype=torch.bfloat16
    )
    wo = model.encoder.block[0].layer[1].DenseReluDense.wo
    assert isinstance(wo, TernaryLinear)
    assert wo.weight.dtype == torch.int8
    dense = copy.deepcopy(model)
    dense.dequantize()
    expected = run(dense)
    assert ((run(model) - expected).norm() / expected.norm()).item() < 0.05


def test_device_map(folders):
    model = type(build("clip")).from_pretrained(folders[0] / "clip", device_map="cpu")
    assert torch.equal(run(model), folders[1]["clip"])


def test_rotation_and_low_rank_are_saved_and_loaded(tmp_path):
    config = TernaryConfig(group_size=8, activation_dtype="none", hadamard=8, rank=2)
    first = quantize(build("t5"), config)
    first.save_pretrained(tmp_path)
    second = type(first).from_pretrained(tmp_path)
    specs = [layer.spec for layer in packed_layers(second).values()]
    assert {(spec.hadamard, spec.rank) for spec in specs} == {(8, 2)}
    assert torch.equal(run(second), run(first))
    half = type(first).from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, layer in packed_layers(half).items():
        assert torch.equal(layer.low_rank.up, packed_layers(first)[name].low_rank.up)  # never cast with the model


def test_dequantize_after_saving(tmp_path):
    model = quantize(build("t5"), CONFIG)
    expected = run(model)
    model.save_pretrained(tmp_path)  # writes the dtype into the config, as a string
    model.dequantize()
    torch.testing.assert_close(run(model), expected, atol=1e-4, rtol=0)
