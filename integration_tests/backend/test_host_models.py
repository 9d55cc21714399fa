# SPDX-License-Identifier: Apache-2.0
"""What diffusers' and transformers' own methods do with packed models: casts, counts, copies, averages."""

import copy

import diffusers
import pytest
import torch
from diffusers import (
    ControlNetModel,
    FluxControlNetModel,
    FluxImg2ImgPipeline,
    FluxTransformer2DModel,
    SD3ControlNetModel,
    UNetMotionModel,
    ZImageControlNetModel,
)
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from torch import nn

from diffusers_ternary import TernaryConfig, quantize
from diffusers_ternary.backend import compat_models, packed_layers
from integration_tests.support import denoisers, text_encoders
from integration_tests.support.pipelines import PIPELINES, draw


VERSION = f"(diffusers {diffusers.__version__})"
MODELS = {
    "flux": denoisers.flux,
    "sd3": denoisers.sd3,
    "sdxl_unet": denoisers.sdxl_unet,
    "clip": text_encoders.clip,
    "t5": text_encoders.t5,
}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.dequantize(torch.float32) for name, layer in packed_layers(model).items()}


class TestCasts:
    @pytest.mark.parametrize("kind", ["ternary", "int8"])
    @pytest.mark.parametrize("name", MODELS)
    def test_codes_and_scales_stay_and_the_rest_is_cast(self, name, kind):
        model = quantize(MODELS[name](), TernaryConfig(kind=kind))
        before = weights(model)
        for cast, dtype in (
            (lambda: model.to(torch.bfloat16), torch.bfloat16),
            (lambda: model.to(dtype=torch.float16), torch.float16),
            (lambda: model.float(), torch.float32),
            (lambda: model.half(), torch.float16),
            (lambda: model.to("cpu", torch.float32), torch.float32),
        ):
            assert cast() is model
            assert model.dtype == dtype
            assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {dtype}
            assert model.is_quantized
            assert all(torch.equal(weight, before[layer]) for layer, weight in weights(model).items())

    @pytest.mark.parametrize("dtype", [None, torch.bfloat16])
    def test_from_pipe_casts_both_pipelines_like_float_ones(self, dtype):
        packed = quantize(PIPELINES["flux"].build().to(torch.bfloat16))
        new = FluxImg2ImgPipeline.from_pipe(packed, **({} if dtype is None else {"dtype": dtype}))
        for pipeline in (packed, new):
            dtypes = {part.dtype for part in pipeline.components.values() if isinstance(part, nn.Module)}
            assert dtypes == {dtype or torch.float32}
        assert bool(torch.isfinite(draw("flux", packed)).all())

    def test_a_vae_with_packed_layers_is_upcast_for_decoding(self):
        pipeline = PIPELINES["sdxl"].build().to(torch.float16)
        quantize(pipeline, TernaryConfig(components={"unet": "ternary", "vae": "int8"}))
        before = weights(pipeline.vae)
        pipeline.upcast_vae()
        assert pipeline.vae.dtype == torch.float32
        assert all(torch.equal(weight, before[layer]) for layer, weight in weights(pipeline.vae).items())

    def test_inputs_follow_a_model_that_torch_casts(self):
        """`nn.Module.bfloat16`, which diffusers does not guard."""
        model = quantize(denoisers.sana()).eval()
        inputs = {
            "hidden_states": torch.randn(1, 4, 8, 8),
            "encoder_hidden_states": torch.randn(1, 5, 32),
            "timestep": torch.tensor([1]),
        }
        half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}
        wide = model(**half)[0]
        assert wide.dtype == torch.float32  # the model is float32: its 16-bit inputs are raised
        narrow = model.bfloat16()(**half)[0]
        assert narrow.dtype == torch.bfloat16
        assert (narrow.float() - wide).norm() < 0.05 * wide.norm()
        assert model.float()(**half)[0].dtype == torch.float32


class TestCounts:
    @pytest.mark.parametrize("kind", ["ternary", "int8"])
    @pytest.mark.parametrize("name", MODELS)
    def test_parameters_of_the_float_model(self, name, kind):
        model = MODELS[name]()
        wanted = [model.num_parameters(), model.num_parameters(exclude_embeddings=True)]
        quantize(model, TernaryConfig(kind=kind, **({"rank": 2, "hadamard": 16} if kind == "ternary" else {})))
        assert [model.num_parameters(), model.num_parameters(exclude_embeddings=True)] == wanted

    def test_trainable_parameters_are_those_of_the_adapter(self):
        model = quantize(denoisers.sd3()).requires_grad_(False)
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
        wanted = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
        assert model.num_parameters(only_trainable=True) == wanted

    def test_a_fused_layer_counts_once(self):
        model = denoisers.sd3()
        wanted = model.num_parameters()
        layer = next(iter(packed_layers(quantize(model)).values()))
        layer.fuse(layer.dequantize())
        assert model.num_parameters() == wanted


class TestControlNetworks:
    @pytest.mark.parametrize(
        ("build", "make"),
        [
            (
                denoisers.flux,
                lambda model: FluxControlNetModel.from_transformer(
                    model, num_layers=1, num_single_layers=1, attention_head_dim=32, num_attention_heads=8
                ),
            ),
            (denoisers.sd3, lambda model: SD3ControlNetModel.from_transformer(model, num_layers=1)),
        ],
    )
    def test_they_start_from_the_dequantized_weights(self, build, make):
        model = quantize(build())
        dense = copy.deepcopy(model).dequantize().state_dict()
        control = make(model)
        assert not packed_layers(control)
        assert "quantization_config" not in control.config
        copied = {name: value for name, value in control.state_dict().items() if name in dense and "blocks" in name}
        assert any(f"{name}.weight" in copied for name in packed_layers(model))
        assert all(torch.equal(value, dense[name]) for name, value in copied.items())
        assert packed_layers(model), "the model itself stays packed"

    @pytest.mark.parametrize("cls", [ControlNetModel, UNetMotionModel])
    def test_of_a_unet(self, cls):
        model = denoisers.plain_unet()
        quantize(model)
        dense = copy.deepcopy(model).dequantize().state_dict()
        control = (cls.from_unet if cls is ControlNetModel else cls.from_unet2d)(model)
        copied = {name: value for name, value in control.state_dict().items() if name in dense}
        assert any(f"{name}.weight" in copied for name in packed_layers(model))
        assert all(torch.equal(value, dense[name]) for name, value in copied.items() if "motion" not in name)

    def test_the_constructors_are_found(self):
        found = {cls.__name__ for cls, _ in compat_models.control_constructors()}
        assert {"ControlNetModel", "FluxControlNetModel", "SD3ControlNetModel", "UNetMotionModel"} <= found, VERSION
        assert "from_transformer" in vars(ZImageControlNetModel)


class TestAverages:
    def test_saving_an_average_says_what_to_do_and_that_works(self, tmp_path):
        model = quantize(denoisers.flux())
        average = EMAModel(model.parameters(), model_cls=FluxTransformer2DModel, model_config=model.config)
        with pytest.raises(ValueError, match=r"copy_to\(model.parameters\(\)\)"):
            average.save_pretrained(tmp_path / "average")
        assert not (tmp_path / "average").exists()
        before = weights(model)
        average.store(model.parameters())
        average.copy_to(model.parameters())
        model.save_pretrained(tmp_path / "average")
        average.restore(model.parameters())
        reloaded = FluxTransformer2DModel.from_pretrained(tmp_path / "average")
        assert all(torch.equal(weight, before[name]) for name, weight in weights(reloaded).items())

    def test_float_models_are_averaged_as_ever(self, tmp_path):
        quantize(denoisers.flux())
        model = denoisers.flux()
        average = EMAModel(model.parameters(), model_cls=FluxTransformer2DModel, model_config=model.config)
        average.save_pretrained(tmp_path)
        assert FluxTransformer2DModel.from_pretrained(tmp_path).num_parameters() == model.num_parameters()


class TestCanaries:
    def test_the_hosts_still_refuse_by_the_mark(self):
        """Without it the replaced methods would be needless."""
        model = denoisers.pixart()
        model.is_quantized = True  # no packed layer of ours: the host's own answer
        quantize(denoisers.pixart())
        for cast in (lambda: model.to(torch.bfloat16), model.half, model.float):
            with pytest.raises(ValueError, match="quantized model"):
                cast()

    def test_compiled_modules_are_unwrapped(self):
        layer = nn.Linear(2, 2)
        assert compat_models.unwrap_compiled(torch.compile(layer)) is layer
        assert compat_models.unwrap_compiled(layer) is layer
        assert compat_models.unwrap_compiled(None) is None


@pytest.mark.parametrize("name", ["flux", "sdxl_unet", "t5"])
def test_codes_are_not_trained(name):
    """torch would stop at the first codes, with a bare message and the layers before them made trainable."""
    model = quantize(MODELS[name]())
    before = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    for module in (model, next(iter(packed_layers(model).values()))):
        with pytest.raises(ValueError, match=r"holds codes.*Train an adapter.*distill.*dequantize\(\)"):
            module.requires_grad_(True)
    assert {key: parameter.requires_grad for key, parameter in model.named_parameters()} == before
    assert not any(parameter.requires_grad for parameter in model.requires_grad_(False).parameters())
    model.dequantize()
    assert all(parameter.requires_grad for parameter in model.requires_grad_(True).parameters())
