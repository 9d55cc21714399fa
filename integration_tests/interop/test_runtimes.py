# SPDX-License-Identifier: Apache-2.0
"""Sizes that are told beforehand against the files that are then written."""

import json

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file
from typer.testing import CliRunner

from diffusers_ternary import TernaryConfig, quantize
from diffusers_ternary.backend import StoredTensor
from diffusers_ternary.backend.plan import layer_spec, plan_conversion
from diffusers_ternary.cli.app import app
from diffusers_ternary.format import FileLayout, LayerSpec
from diffusers_ternary.interop import export_gguf, export_mflux
from diffusers_ternary.interop.compat import open_reader
from diffusers_ternary.interop.gguf_blocks import RUNTIMES
from diffusers_ternary.interop.runtimes import _gguf, _mflux, runtime_sizes
from integration_tests.support import denoisers


@pytest.mark.parametrize("options", [{"group_size": 256}, {"group_size": 64, "overrides": {"*.norm1.linear": "int8"}}])
def test_sizes_are_those_of_the_files(tmp_path, options) -> None:
    pytest.importorskip("gguf")
    torch.manual_seed(0)
    model = quantize(denoisers.flux().to(torch.bfloat16), TernaryConfig(**options))
    model.save_pretrained(tmp_path / "in")
    sizes = {size.runtime: size for size in runtime_sizes(tmp_path / "in")}
    assert not any(size.reason for size in sizes.values())
    for runtime in RUNTIMES:
        export_gguf(tmp_path / "in", tmp_path / f"{runtime}.gguf", runtime=runtime)
        tensors = open_reader(tmp_path / f"{runtime}.gguf").tensors
        assert sizes[runtime].bytes == sum(int(tensor.n_bytes) for tensor in tensors)
        assert (sizes[runtime].memory > sizes[runtime].bytes) == (runtime in ("comfyui", "diffusers"))
    export_mflux(tmp_path / "in", tmp_path / "mflux")
    stored = load_file(tmp_path / "mflux" / "0.safetensors")
    assert sizes["mflux"].bytes == sum(tensor.nbytes for tensor in stored.values())
    own = sizes["diffusers-ternary"]
    assert own.bytes == sum(
        tensor.nbytes for tensor in load_file(next((tmp_path / "in").glob("*.safetensors"))).values()
    )
    assert own.memory == sum(parameter.nbytes for parameter in model.state_dict().values())


def test_the_command_says_what_cannot_be_exported(tmp_path) -> None:
    quantize(denoisers.flux(), TernaryConfig(hadamard=64)).save_pretrained(tmp_path / "in")
    told = CliRunner().invoke(app, ["inspect", str(tmp_path / "in"), "--runtimes"])
    assert told.exit_code == 0, told.output
    assert "its inputs are rotated" in " ".join(told.output.split())
    sizes = json.loads(CliRunner().invoke(app, ["inspect", str(tmp_path / "in"), "--runtimes", "--json"]).stdout)
    assert [size["runtime"] for size in sizes if not size["reason"]] == ["diffusers-ternary"]


class Planned:
    """A packed model of which only the plan is there: a [`PackedFolder`] as far as sizes are concerned."""

    def __init__(self, model: torch.nn.Module, config: TernaryConfig) -> None:
        plan = plan_conversion(model, config)
        layers = {name: layer_spec(kind, model.get_submodule(name), config) for name, kind in plan.kinds.items()}
        self.class_name, self.layout = type(model).__name__, FileLayout(layers, {})
        self.tensors = {
            name: StoredTensor("", "BF16", tuple(tensor.shape)) for name, tensor in model.state_dict().items()
        }

    def names(self) -> set[str]:
        return set(self.tensors)

    def spec(self, name: str) -> LayerSpec | None:
        return self.layout.layers.get(name.removesuffix(".weight"))

    def group_scales(self, name: str) -> torch.Tensor:
        return torch.ones(1, 1)


@pytest.mark.parametrize(
    ("overrides", "tq2_0", "q2_0", "mflux"),
    [
        # 11.83 of 11.90 billion weights are packed; what embeds and the last modulation stay bfloat16.
        (None, 3.19, 3.47, 3.46),
        ({"*": "ternary"}, 3.08, 3.36, 3.35),
    ],
)
def test_flux_dev_from_its_shapes(overrides, tq2_0, q2_0, mflux) -> None:
    """GB."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True).to(torch.bfloat16)
    planned = Planned(model, TernaryConfig(group_size=256, scale_layout="portable", overrides=overrides))
    sizes = [_gguf(planned, "sdcpp-cpu"), _gguf(planned, "sdcpp-gpu"), _mflux(planned)]
    assert [round(size.bytes / 1e9, 2) for size in sizes] == [tq2_0, q2_0, mflux], sizes
