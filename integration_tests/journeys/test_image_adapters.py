# SPDX-License-Identifier: Apache-2.0
"""IP-Adapters and ternary denoisers, in every order: the picture counts as it does on the float model."""

import copy

import pytest
import torch

from diffusers_ternary import CalibrationConfig, TernaryConfig, calibrate, quantize
from diffusers_ternary.backend import packed_layers, plan_conversion
from diffusers_ternary.calibration import SolverConfig
from integration_tests.support import image_adapters
from integration_tests.support.more_pipelines import MORE_PIPELINES
from integration_tests.support.pipelines import PIPELINES, quiet


EXACT = TernaryConfig(activation_dtype="none")
# A list of everything that is a layer: adapters are left alone even so.
EVERYTHING = TernaryConfig(
    activation_dtype="none", overrides={"*attn*": "ternary", "*hid_proj*": "int8", "image_proj*": "int8"}
)
NAMES = ["stable_diffusion", "flux", "sd3"]


def build(name):
    pipeline = (PIPELINES.get(name) or MORE_PIPELINES[name]).build()
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return quiet(pipeline)


def denoiser(pipeline):
    return pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer


def draw(name, pipeline, *, picture=True):
    extra = PIPELINES[name].call if name in PIPELINES else {}
    return pipeline(
        "a cat",
        height=16,
        width=16,
        num_inference_steps=2,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        **extra,
        **image_adapters.call(name, picture=picture),
    ).images


def relative(actual, expected):
    return float((actual - expected).norm() / expected.norm())


@pytest.fixture(scope="module", params=NAMES)
def reference(request):
    """Name, drawing of the float pipeline of the packed weights with the adapter, and how much the picture matters."""
    pipeline = quantize(build(request.param), EXACT)
    denoiser(pipeline).dequantize()
    image_adapters.load(request.param, pipeline)
    drawn = draw(request.param, pipeline)
    effect = relative(draw(request.param, pipeline, picture=False), drawn)
    assert effect > 0.01
    return request.param, drawn


@pytest.mark.parametrize("order", ["load, quantize", "quantize, load"])
def test_the_picture_counts(reference, order, tmp_path, caplog):
    name, expected = reference
    pipeline = build(name)
    layers = plan_conversion(denoiser(pipeline), EXACT).kinds
    for step in order.split(", "):
        if step == "load":
            image_adapters.load(name, pipeline)
        else:
            quantize(pipeline, EXACT)
    model = denoiser(pipeline)
    assert packed_layers(model).keys() == layers.keys()
    assert relative(draw(name, pipeline), expected) < 1e-4
    # A file holds the model, to which the adapter can be loaded again.
    model.save_pretrained(tmp_path)
    assert "image prompt adapter" in caplog.text
    assert any("processor" in key or "proj" in key for key in model.state_dict())
    again = copy.copy(pipeline)
    loaded = type(model).from_pretrained(tmp_path).eval()
    again.register_modules(**{"unet" if hasattr(pipeline, "unet") else "transformer": loaded})
    image_adapters.load(name, again)
    assert relative(draw(name, again), expected) < 1e-4
    # Going back to floats, and taking the adapter away.
    model.dequantize()
    assert relative(draw(name, pipeline), expected) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_unloading_leaves_the_ternary_model(name, tmp_path):
    pipeline = build(name)
    image_adapters.load(name, pipeline)
    quantize(pipeline, EXACT)
    pipeline.unload_ip_adapter()
    model = denoiser(pipeline)
    expected = quantize(denoiser(build(name)), EXACT).state_dict()
    actual = model.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], tensor) for key, tensor in expected.items())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("name", NAMES)
def test_overrides_do_not_reach_adapters(name):
    pipeline = build(name)
    image_adapters.load(name, pipeline)
    parts = {"processor", "image_projection_layers", "image_proj"}
    assert not [key for key in plan_conversion(denoiser(pipeline), EVERYTHING).kinds if parts & set(key.split("."))]


def test_calibration_with_a_picture():
    pipeline = build("stable_diffusion")
    image_adapters.load("stable_diffusion", pipeline)
    before = draw("stable_diffusion", pipeline)
    settings = CalibrationConfig(
        call_kwargs={
            "height": 16,
            "width": 16,
            "num_inference_steps": 1,
            **image_adapters.call("stable_diffusion", picture=True),
        },
        batch_size=1,
        solver=SolverConfig(refit=False, descent_passes=0, starts=1),
    )
    report = calibrate(pipeline, ["a cat"], EXACT, settings).ternary_report
    assert not [layer.name for layer in report.layers if "processor" in layer.name]
    after = draw("stable_diffusion", pipeline)
    assert 0 < relative(after, before) < 1
    assert relative(draw("stable_diffusion", pipeline, picture=False), after) > 0.01


def test_the_text_projection_that_an_adapter_displaces_is_saved_in_its_place(tmp_path):
    """Kolors: `load_ip_adapter` moves `encoder_hid_proj` away. A float model saved like that has lost it."""
    pipeline = build("stable_diffusion")
    config = {name: value for name, value in pipeline.unet.config.items() if not name.startswith("_")}
    config |= {"encoder_hid_dim": 20, "encoder_hid_dim_type": "text_proj"}
    pipeline.unet = type(pipeline.unet)(**config).eval()
    quantize(pipeline.unet, TernaryConfig(overrides={"encoder_hid_proj": "int8"}))
    expected = pipeline.unet.encoder_hid_proj.dequantize()
    image_adapters.load("stable_diffusion", pipeline)
    assert pipeline.unet.text_encoder_hid_proj is not pipeline.unet.encoder_hid_proj
    pipeline.unet.save_pretrained(tmp_path)
    again = type(pipeline.unet).from_pretrained(tmp_path)
    assert torch.equal(again.encoder_hid_proj.dequantize(), expected)
    assert packed_layers(again).keys() == {
        name.replace("text_encoder_hid_proj", "encoder_hid_proj") for name in packed_layers(pipeline.unet)
    }
