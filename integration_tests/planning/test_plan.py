# SPDX-License-Identifier: Apache-2.0
"""Predictions against what `real_size.py` measured, and proposals that fit, for checkpoints that are headers only."""

import csv
import json
import runpy
from pathlib import Path

import pytest
import torch
from diffusers import SanaTransformer2DModel

from diffusers_ternary import TernaryConfig
from diffusers_ternary.demo import demo_folder
from diffusers_ternary.planning import Part, plan, plan_parts
from diffusers_ternary.planning.estimates import LIBRARIES, ModelEstimate
from diffusers_ternary.planning.parts import pipeline_models
from diffusers_ternary.planning.picture import Picture
from integration_tests.support.command_line import parse_command, run_command
from integration_tests.support.header_only import write_model, write_pipeline


ROOT = Path(__file__).parents[2]
MEASURED = ROOT / "integration_tests" / "benchmarks" / "results" / "real_size.csv"
SMALL = "int8 embedders, group size 256"
EMBEDDERS = {"time_embed.*": "int8", "caption_projection.*": "int8", "proj_out": "int8"}
GB = 10**9


@pytest.fixture(scope="module")
def published() -> dict:
    """Of `examples/sizes.py`: published pipelines on the meta device."""
    return runpy.run_path(str(ROOT / "examples" / "sizes.py"))


@pytest.fixture(scope="module")
def flux(published, tmp_path_factory) -> Path:
    """FLUX.1-dev, 34 GB, as headers and holes."""
    with torch.device("meta"):
        models = published["PIPELINES"]["FLUX.1-dev"].models()
    folder = write_pipeline(tmp_path_factory.mktemp("pipelines") / "FLUX.1-dev", "FluxPipeline", models)
    assert sum(file.stat().st_blocks * 512 for file in folder.rglob("*.safetensors")) < 10e6
    return folder


@pytest.fixture(scope="module")
def measured() -> dict[tuple[str, str, str], float]:
    with open(MEASURED, newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        (row["model"], row["setting"], row["quantity"]): GB * float(row["value"])
        for row in rows
        if row["unit"] == "GB"
    }


def estimates(flux: Path) -> dict[tuple[str, str], ModelEstimate]:
    with torch.device("meta"):
        sana = Part.of_model("transformer", SanaTransformer2DModel())
    small = TernaryConfig(group_size=256, overrides=EMBEDDERS)
    return {
        ("flux.1-dev", "default"): ModelEstimate(pipeline_models(str(flux))["transformer"], TernaryConfig()),
        ("sana-1.6b", "default"): ModelEstimate(sana, TernaryConfig()),
        ("sana-1.6b", SMALL): ModelEstimate(sana, small),
    }


def test_sizes_and_peaks_are_those_that_were_measured(flux, measured):
    for subject, estimate in estimates(flux).items():
        for quantity, predicted, tolerance in (
            ("original files", estimate.part.bytes, 0.001),
            ("packed files", estimate.file, 0.002),
            ("model in memory", estimate.memory, 0.001),
            ("peak resident, quantization", estimate.quantizing, 0.15),
            ("peak resident, loading, above imports", estimate.loading, 0.15),
        ):
            assert predicted == pytest.approx(measured[(*subject, quantity)], rel=tolerance), (subject, quantity)


def test_the_peak_of_a_denoising_step(measured):
    """Measured in float32 on a CPU, at 1024 pixels."""
    with torch.device("meta"):
        sana = Part.of_model("transformer", SanaTransformer2DModel())
    estimate = ModelEstimate(sana, TernaryConfig(), torch.float32)
    subject = "sana-1.6b", "default"
    expected = measured[(*subject, "peak above imports, denoising, packed")]
    assert estimate.drawing(1024 + 300) == pytest.approx(expected, rel=0.15)
    libraries = measured[(*subject, "peak resident, denoising, packed")] - expected
    assert pytest.approx(libraries, rel=0.15) == LIBRARIES


@pytest.mark.parametrize(
    ("name", "parameters", "image_tokens"),
    [
        ("FLUX.1-dev", 11.9e9, 4096),
        ("FLUX.2-klein-4B", 3.9e9, 4096),
        ("Z-Image-Turbo", 6.15e9, 4096),
        ("Qwen-Image", 20.4e9, 4096),
        ("SANA-1.6B", 1.6e9, 1024),
        ("SD-3.5-large", 8.06e9, 4096),
        ("SDXL", 2.57e9, 4096),
        ("Wan2.2-T2V-A14B", 28.6e9, 21 * 39**2),
    ],
)
def test_published_models_have_their_published_sizes(published, name, parameters, image_tokens):
    parts = published["published"](name)
    picture = published["PIPELINES"][name].picture
    denoisers = [part for part in parts.values() if part.denoises]
    assert sum(part.weights for part in denoisers) == pytest.approx(parameters, rel=0.02)
    assert picture.tokens(denoisers[0], parts.values()) == image_tokens + 512


def test_what_fits_flux(flux):
    """From much to little: as it is, int8, ternary, and one component at a time."""
    kinds = {}
    for size in (48, 24, 16, 12, 6):
        found = plan(flux, vram=f"{size}GB")
        assert found.drawing <= size * GB
        kinds[size] = {part.name: part.kind for part in found.components}, found.offload
    float_, int8, ternary = ({"transformer": kind} for kind in ("float", "int8", "ternary"))
    assert kinds[48][0].items() >= float_.items()
    assert kinds[24][0].items() >= int8.items()
    assert kinds[6] == (
        {"transformer": "ternary", "text_encoder": "float", "text_encoder_2": "int8", "vae": "float"},
        True,
    )
    assert kinds[12][0].items() >= ternary.items()
    assert plan(flux, vram="48GB").config is None
    assert plan(flux, vram="48GB").commands == ()
    with pytest.raises(
        ValueError, match=r"does not fit into 2\.00 GB at 1024 x 1024 pixels: the smallest takes 5\.\d\d GB"
    ):
        plan(flux, vram="2GB")


def test_what_it_says_can_be_run(flux):
    found = plan(flux, vram="6GB")
    assert found.config == TernaryConfig(components={"transformer": "ternary", "text_encoder_2": "int8"})
    scope: dict = {}
    code = found.code.replace("DiffusionPipeline.from_pretrained(", "dict(source=").splitlines()
    exec("\n".join(code[:-1]), scope)
    assert scope["pipe"]["quantization_config"] == found.config
    assert code[-1] == "pipe.enable_model_cpu_offload()"
    assert [command.split()[1] for command in found.commands] == ["quantize", "calibrate", "distill"]
    for command in found.commands:
        parse_command(command)


def test_the_command(flux):
    result = run_command("plan", flux, "--vram", "6GB")
    assert result.exit_code == 0, result.output
    assert "one component on the GPU at a time" in result.output
    assert "spoiled when only rounded" in result.output
    assert "--component transformer=ternary --component text_encoder_2=int8" in result.output
    content = json.loads(run_command("plan", flux, "--json").stdout)
    by_name = {part["name"]: part for part in content["components"]}
    assert by_name["transformer"]["file"] == pytest.approx(2.6e9, rel=0.001)
    assert set(by_name["transformer"]["distilling"]) == {"scales", "blockwise", "full", "lora"}
    assert by_name["vae"]["calibrating"] is None
    assert content["config"]["components"] == {"transformer": "ternary", "text_encoder_2": "int8"}
    assert run_command("plan", "demo", "--pixels", "16").exit_code == 0


def test_bad_input(flux, tmp_path):
    def refused(*arguments: object) -> str:
        result = run_command("plan", *arguments)
        assert result.exit_code == 3, result.output
        return result.output

    assert "is not a local folder" in refused("nobody/nothing-of-this-name")
    with torch.device("meta"):
        write_model(tmp_path / "single", SanaTransformer2DModel(num_layers=1))
    assert "is not a pipeline" in refused(tmp_path / "single")
    assert "is not a positive size" in refused(flux, "--vram", "much")
    assert "the smallest takes" in refused(flux, "--vram", "1GB")
    write_pipeline(tmp_path / "no denoiser", "FluxPipeline", {})
    assert "has no component that denoises" in refused(tmp_path / "no denoiser")
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (tmp_path / "no weights" / "transformer").mkdir(parents=True)
    (tmp_path / "no weights" / "model_index.json").write_text(json.dumps(index))
    config = tmp_path / "no weights" / "transformer" / "config.json"
    config.write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    assert "holds no safetensors files" in refused(tmp_path / "no weights")
    config.write_text(
        json.dumps({"_class_name": "FluxTransformer2DModel", "quantization_config": {"quant_method": "x"}})
    )
    assert "is quantized already (x)" in refused(tmp_path / "no weights")
    with pytest.raises(ValueError, match="pixels=0 is not a positive integer"):
        plan(demo_folder(), pixels=0)


def test_several_denoisers_are_distilled_one_by_one(published):
    parts = published["published"]("Wan2.2-T2V-A14B")
    found = plan_parts(parts, source="Wan", picture=Picture(632, 81))
    assert [command.split()[1] for command in found.commands] == ["quantize", "calibrate", "distill", "distill"]
    assert found.commands[-1].endswith("--component transformer_2")
    for command in found.commands:
        parse_command(command)
