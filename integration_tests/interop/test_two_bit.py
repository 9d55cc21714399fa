# SPDX-License-Identifier: Apache-2.0
"""gemlite and HQQ state dicts against weights written element by element (`support/foreign.py`)."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import save_file
from torch import nn

from diffusers_ternary import convert
from diffusers_ternary.backend import packed_layers
from diffusers_ternary.interop.inspection import inspect_path
from integration_tests.support import denoisers, foreign


LAYERS = 25  # linear layers in the blocks of the small denoiser


def published(folder: Path, encode, *, file: str = "state_dict.pt", nested: bool = False) -> dict[str, torch.Tensor]:
    """A denoiser published as Bonsai Image is: 2-bit layers in the blocks, float16 elsewhere. Returns it unpacked."""
    torch.manual_seed(0)
    model = denoisers.sd3().half()
    folder.mkdir(exist_ok=True)
    model.save_config(folder)
    state = dict(model.state_dict())
    dense = {}
    for seed, (name, module) in enumerate(model.named_modules()):
        if type(module) is nn.Linear and "transformer_blocks" in name:
            size = (32, 64)[seed % 2] if encode is not channelwise else module.in_features
            weight = foreign.random_ternary(module.out_features, module.in_features, size, seed=seed)
            del state[f"{name}.weight"]
            layer = encode(weight)
            state.update({name: layer} if nested else {f"{name}.{part}": value for part, value in layer.items()})
            if nested:
                layer["bias"] = state.pop(f"{name}.bias")
            dense[f"{name}.weight"] = torch.from_numpy(weight.dense())
    if file.endswith(".pt"):
        torch.save(state, folder / file)
    else:
        save_file(state, folder / file)
    rest = {name: value for name, value in model.state_dict().items() if name not in dense}
    return {**rest, **dense}


def channelwise(weight: foreign.Ternary) -> dict[str, torch.Tensor]:
    return foreign.gemlite(weight, mode=1, bits=8)


def assert_converted(folder: Path, out: Path, expected: dict[str, torch.Tensor]) -> None:
    (report,) = convert(folder, out)
    assert len(report.layers) == LAYERS
    assert report.verified
    model = SD3Transformer2DModel.from_pretrained(out, dtype=torch.float16)
    assert packed_layers(model).keys() == report.layers.keys()
    model.dequantize()
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value.half()), name


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("mode", [3, 4])
def test_gemlite(tmp_path, mode, bits):
    expected = published(tmp_path / "in", lambda weight: foreign.gemlite(weight, mode=mode, bits=bits))
    assert_converted(tmp_path / "in", tmp_path / "out", expected)


def test_gemlite_with_one_scale_per_row(tmp_path):
    assert_converted(tmp_path / "in", tmp_path / "out", published(tmp_path / "in", channelwise))


def test_gemlite_in_safetensors(tmp_path):
    name = "diffusion_pytorch_model.safetensors"
    expected = published(tmp_path / "in", lambda weight: foreign.gemlite(weight, mode=3, bits=8), file=name)
    assert_converted(tmp_path / "in", tmp_path / "out", expected)


@pytest.mark.parametrize("zero", [1, 2])
def test_hqq(tmp_path, zero):
    expected = published(tmp_path / "in", lambda weight: foreign.hqq(weight, zero=zero), file="qmodel.pt", nested=True)
    assert_converted(tmp_path / "in", tmp_path / "out", expected)


def test_hqq_in_safetensors(tmp_path):
    name = "diffusion_pytorch_model.safetensors"
    expected = published(tmp_path / "in", lambda weight: foreign.hqq_for_safetensors(foreign.hqq(weight)), file=name)
    assert_converted(tmp_path / "in", tmp_path / "out", expected)


def test_the_config_of_the_backend_does_not_survive(tmp_path):
    published(tmp_path / "in", lambda weight: foreign.gemlite(weight, mode=3, bits=8))
    file = tmp_path / "in" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": {"quant_method": "gemlite"}}))
    (tmp_path / "in" / "quantization_config.json").write_text("{}")
    convert(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out" / "quantization_config.json").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "diffusers_ternary"


@pytest.mark.parametrize(
    ("encode", "file", "kind"),
    [
        (lambda weight: foreign.gemlite(weight, mode=3, bits=8), "state_dict.pt", "gemlite 2-bit"),
        (
            lambda weight: foreign.gemlite(weight, mode=3, bits=8),
            "diffusion_pytorch_model.safetensors",
            "gemlite 2-bit",
        ),
        (lambda weight: foreign.hqq_for_safetensors(foreign.hqq(weight)), "model.safetensors", "HQQ"),
    ],
)
def test_inspect(tmp_path, encode, file, kind):
    published(tmp_path, encode, file=file)
    (component,) = inspect_path(tmp_path)
    assert component.format == kind
    rows = [row for row in component.rows if row.shape is not None]
    assert sum(row.count for row in rows) == LAYERS
    assert {row.kind for row in rows} == {kind}
    assert 2 < component.packed_bits_per_weight < 4


class TestBadInput:
    def refused(self, tmp_path: Path, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            convert(tmp_path / "in", tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["in"]

    def damaged(self, tmp_path: Path, change) -> None:
        def encode(weight: foreign.Ternary) -> dict[str, torch.Tensor]:
            layer = foreign.gemlite(weight, mode=3, bits=8)
            change(layer)
            return layer

        published(tmp_path / "in", encode)

    def test_another_bit_width(self, tmp_path):
        self.damaged(tmp_path, lambda layer: layer["metadata"].__setitem__(1, 4))
        self.refused(tmp_path, "is not a 2-bit weight")

    def test_a_missing_part(self, tmp_path):
        self.damaged(tmp_path, lambda layer: layer.pop("scales"))
        self.refused(tmp_path, "lacks scales")

    def test_a_missing_shape(self, tmp_path):
        self.damaged(tmp_path, lambda layer: layer.pop("orig_shape"))
        self.refused(tmp_path, "neither orig_shape")

    def test_codes_of_another_shape(self, tmp_path):
        self.damaged(tmp_path, lambda layer: layer.update(W_q=layer["W_q"][:-1]))
        self.refused(tmp_path, "is damaged")

    def test_another_architecture(self, tmp_path):
        published(tmp_path / "in", lambda weight: foreign.gemlite(weight, mode=3, bits=8))
        denoisers.flux().save_config(tmp_path / "in")
        self.refused(tmp_path, "is not a FluxTransformer2DModel")

    def test_a_truncated_file(self, tmp_path):
        published(tmp_path / "in", lambda weight: foreign.gemlite(weight, mode=3, bits=8))
        file = tmp_path / "in" / "state_dict.pt"
        file.write_bytes(file.read_bytes()[:5000])
        self.refused(tmp_path, "cannot be read as a state dict")

    def test_a_pickle_that_would_run_code(self, tmp_path):
        published(tmp_path / "in", lambda weight: foreign.gemlite(weight, mode=3, bits=8))
        torch.save({"run": print}, tmp_path / "in" / "state_dict.pt")
        self.refused(tmp_path, "cannot be read as a state dict")

    def test_hqq_of_another_width(self, tmp_path):
        published(
            tmp_path / "in",
            lambda weight: {**foreign.hqq(weight), "packing": "4bit_u8"},
            file="qmodel.pt",
            nested=True,
        )
        self.refused(tmp_path, "HQQ packing '4bit_u8'")
