# SPDX-License-Identifier: Apache-2.0
"""`convert` as people call it: a published ternary pipeline to a packed one, to GGUF and back."""

import json
import sys

import pytest
import torch
from torch import nn

from integration_tests.support import foreign, pipelines
from integration_tests.support.command_line import run_command
from integration_tests.support.fresh_process import run_python


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A pipeline whose transformer was made ternary elsewhere and published unpacked, in bfloat16."""
    folder = tmp_path_factory.mktemp("published") / "flux"
    torch.manual_seed(0)
    pipe = pipelines.PIPELINES["flux"].build().to(torch.bfloat16)
    count = 0
    for name, module in pipe.transformer.named_modules():
        if type(module) is nn.Linear and "block" in name:
            weight = foreign.random_ternary(module.out_features, module.in_features, 256, seed=count)
            module.weight.data = torch.from_numpy(weight.dense()).bfloat16()
            count += 1
    pipe.save_pretrained(folder)
    (folder / "README.md").write_text("card")
    return folder


@pytest.fixture(scope="module")
def converted(published, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "flux"
    result = run_command("convert", published, folder)
    assert result.exit_code == 0, result.output
    assert "20 ternary layers packed" in result.output
    assert "every weight equals the source" in result.output
    return folder


def test_inspect_says_what_to_do(published, converted):
    before = run_command("inspect", published)
    assert "diffusers-ternary convert" in before.output
    after = {part["name"]: part for part in json.loads(run_command("inspect", converted, "--json").output)}
    assert after["transformer"]["format_version"] == 2
    assert after["text_encoder"]["format_version"] is None


def test_a_fresh_process_runs_the_converted_pipeline(published, converted):
    same, size = run_python(
        """
        import json, sys, torch
        from diffusers import DiffusionPipeline, FluxTransformer2DModel
        import diffusers_ternary
        source, converted = sys.argv[1:]
        pipe = DiffusionPipeline.from_pretrained(converted, dtype=torch.bfloat16)
        image = pipe("a prompt", num_inference_steps=1, height=16, width=16, output_type="pt").images
        pipe.transformer.dequantize()
        stock = FluxTransformer2DModel.from_pretrained(source + "/transformer", dtype=torch.bfloat16).state_dict()
        ours = pipe.transformer.state_dict()
        same = ours.keys() == stock.keys() and all(torch.equal(ours[name], stock[name]) for name in stock)
        print(json.dumps([same, list(image.shape)]))
        """,
        published,
        converted,
    )
    assert same
    assert size[:2] == [1, 3]


def test_everything_else_is_copied(published, converted):
    for file in published.rglob("*"):
        relative = file.relative_to(published)
        if file.is_file() and relative.parts[0] != "transformer":
            assert (converted / relative).read_bytes() == file.read_bytes()
    assert not list(converted.rglob(".*"))


def test_gguf_and_back(converted, tmp_path):
    pytest.importorskip("gguf")
    exported = run_command("convert", converted, tmp_path / "flux.gguf", "--json")
    assert exported.exit_code == 0, exported.output
    report = json.loads(exported.output[exported.output.index("{") :])
    assert report["types"]["tq2_0"] == 13
    assert report["inexact"] == []
    assert "tq2_0" in run_command("inspect", tmp_path / "flux.gguf").output
    back = run_command("convert", tmp_path / "flux.gguf", tmp_path / "back", "--json")
    assert back.exit_code == 0, back.output
    layers = json.loads(back.output[back.output.index("[\n") :])[0]["layers"]
    assert len(layers) == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "gguf", "--type", "q2_k"], "not one of tq2_0, tq1_0"),
        (["--to", "gguf", "--for", "nobody"], "not one of sdcpp-cpu"),
        (["--to", "gguf", "--fallback", "q3"], "not one of f32, f16"),
        (["--to", "onnx"], "not one of packed, gguf, mflux"),
        (["--to", "mflux", "--type", "q4_0"], "An export to mflux has no ternary_type"),
        (["--for", "comfyui"], "belong to an export"),
        (["--to", "mflux", "--variant", "fp16"], "belong to packing a model"),
    ],
)
def test_wrong_option_values_exit_with_2_whatever_the_source(tmp_path, options, message):
    result = run_command("convert", "nowhere/at/all", tmp_path / "out", *options)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/at/all", "out"], "does not exist"),
        (["{published}/text_encoder", "out"], "has no ternary layer"),
        (["{published}", "out", "--component", "unet"], "no component unet"),
        (["{published}/transformer", "out.gguf"], "is not a packed model"),
        (["{converted}/transformer", "out"], "is packed already"),
    ],
)
def test_bad_input_has_exit_code_3_and_writes_nothing(published, converted, tmp_path, arguments, message):
    source, destination, *options = arguments
    source = source.format(published=published, converted=converted)
    result = run_command("convert", source, tmp_path / destination, *options)
    assert result.exit_code == 3
    assert message in result.output
    assert not list(tmp_path.iterdir())


def test_without_the_gguf_package(converted, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    result = run_command("convert", converted, tmp_path / "flux.gguf")
    assert result.exit_code == 3
    assert "pip install diffusers-ternary[gguf]" in result.output
