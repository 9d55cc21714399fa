# SPDX-License-Identifier: Apache-2.0
"""Stock pipelines: quantize by every route, run, save, reload in a fresh process, compare the latents bit by bit."""

import json
import re

import pytest
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig, WanTransformer3DModel
from safetensors import safe_open

from diffusers_ternary import TernaryConfig, quantize
from diffusers_ternary.layers import QuantizedLayer, TernaryLayer, TernaryLinear
from integration_tests.support import denoisers
from integration_tests.support.denoisers import predict
from integration_tests.support.fresh_process import run_python
from integration_tests.support.pipelines import PIPELINES, draw, quiet


pytestmark = pytest.mark.usefixtures("one_thread")
ON_THE_FLY = TernaryConfig(overrides={"*transformer_blocks.0.attn1.to_q": "int8"})


@pytest.fixture(scope="module")
def float_folders(tmp_path_factory):
    """Every pipeline, saved in float32."""
    root = tmp_path_factory.mktemp("float")
    for name, pipeline in PIPELINES.items():
        pipeline.build().save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def drawn(float_folders, tmp_path_factory):
    """Every pipeline quantized on the fly, drawn and saved packed: folder of packed pipelines and their latents."""
    root = tmp_path_factory.mktemp("packed")
    latents = {}
    for name in PIPELINES:
        pipeline = DiffusionPipeline.from_pretrained(float_folders / name, quantization_config=ON_THE_FLY)
        latents[name] = draw(name, pipeline)
        pipeline.save_pretrained(root / name)
    return root, latents


@pytest.fixture(scope="module")
def reloaded(drawn):
    """What one fresh process draws from all packed folders."""
    root, _ = drawn
    return run_python(
        """
        import json, sys
        import torch, diffusers_ternary
        from diffusers import DiffusionPipeline
        from diffusers_ternary.layers import QuantizedLayer
        from integration_tests.support.pipelines import PIPELINES, draw

        torch.set_num_threads(1)
        results = {}
        for name in PIPELINES:
            pipeline = DiffusionPipeline.from_pretrained(f"{sys.argv[1]}/{name}")
            denoiser = getattr(pipeline, PIPELINES[name].denoiser)
            results[name] = {
                "latents": draw(name, pipeline).flatten().tolist(),
                "dtype": str(denoiser.dtype),
                "packed": sum(isinstance(module, QuantizedLayer) for module in denoiser.modules()),
            }
        print(json.dumps(results))
        """,
        root,
    )


@pytest.mark.parametrize("name", PIPELINES)
def test_a_fresh_process_draws_the_same_latents(name, drawn, reloaded):
    root, latents = drawn
    assert torch.isfinite(latents[name]).all()
    assert reloaded[name]["packed"] > 0
    assert reloaded[name]["dtype"] == "torch.float32"
    assert reloaded[name]["latents"] == latents[name].flatten().tolist()
    assert json.loads((root / name / PIPELINES[name].denoiser / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("name", PIPELINES)
def test_quantizing_in_memory_gives_what_on_the_fly_gives(name, drawn, float_folders):
    pipeline = quiet(DiffusionPipeline.from_pretrained(float_folders / name))
    assert quantize(pipeline, ON_THE_FLY) is pipeline
    assert torch.equal(draw(name, pipeline), drawn[1][name])


@pytest.mark.parametrize("name", PIPELINES)
def test_rounding_changed_the_weights(name, drawn, float_folders):
    # A test that compares packed with packed only would pass if nothing were quantized at all.
    float_latents = draw(name, DiffusionPipeline.from_pretrained(float_folders / name))
    assert not torch.equal(float_latents, drawn[1][name])


@pytest.mark.parametrize("name", PIPELINES)
def test_only_the_denoiser_is_quantized(name, drawn):
    pipeline = DiffusionPipeline.from_pretrained(drawn[0] / name)
    for component, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            packed = any(isinstance(part, QuantizedLayer) for part in module.modules())
            assert packed == (component == PIPELINES[name].denoiser), component


@pytest.mark.parametrize("name", PIPELINES)
def test_dequantized_pipelines_draw_the_same(name, drawn):
    pipeline = DiffusionPipeline.from_pretrained(drawn[0] / name)
    denoiser = getattr(pipeline, PIPELINES[name].denoiser)
    for module in denoiser.modules():
        if isinstance(module, TernaryLayer):
            module.activation_dtype = "none"  # a float layer does not round its activations either
    latents = draw(name, pipeline)
    denoiser.dequantize()
    assert not any(isinstance(module, QuantizedLayer) for module in denoiser.modules())
    assert "quantization_config" not in denoiser.config
    torch.testing.assert_close(draw(name, pipeline), latents, rtol=1e-3, atol=1e-3 * latents.std().item())


@pytest.mark.parametrize("name", ["flux", "sdxl"])
def test_a_dequantized_pipeline_is_an_ordinary_one(name, drawn, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(drawn[0] / name)
    getattr(pipeline, PIPELINES[name].denoiser).dequantize()
    expected = draw(name, pipeline)
    pipeline.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert torch.equal(draw(name, again), expected)


class TestRoutes:
    """Every way to say what is to be quantized."""

    @pytest.mark.parametrize(
        "config",
        [
            TernaryConfig(group_size=32),
            PipelineQuantizationConfig(quant_mapping={"transformer": TernaryConfig(group_size=32)}),
            PipelineQuantizationConfig(
                quant_backend="diffusers_ternary",
                quant_kwargs={"group_size": 32},
                components_to_quantize=["transformer"],
            ),
        ],
        ids=["TernaryConfig", "quant_mapping", "quant_backend"],
    )
    def test_pipeline_configs_are_equivalent(self, config, float_folders):
        pipeline = DiffusionPipeline.from_pretrained(float_folders / "pixart", quantization_config=config)
        expected = quantize(DiffusionPipeline.from_pretrained(float_folders / "pixart"), TernaryConfig(group_size=32))
        state, reference = pipeline.transformer.state_dict(), expected.transformer.state_dict()
        assert state.keys() == reference.keys()
        assert all(torch.equal(state[name], reference[name]) for name in state)
        assert pipeline.transformer.config.quantization_config == TernaryConfig(group_size=32)

    def test_components_reach_text_encoders(self, float_folders, tmp_path):
        config = TernaryConfig(components=["transformer", "text_encoder", "text_encoder_2"])
        pipeline = DiffusionPipeline.from_pretrained(float_folders / "flux", quantization_config=config)
        for component in config.components:
            modules = getattr(pipeline, component).modules()
            assert any(isinstance(module, TernaryLinear) for module in modules), component
        expected = draw("flux", pipeline)
        pipeline.save_pretrained(tmp_path)
        assert torch.equal(draw("flux", DiffusionPipeline.from_pretrained(tmp_path)), expected)
        in_memory = quantize(DiffusionPipeline.from_pretrained(float_folders / "flux"), config)
        assert torch.equal(draw("flux", in_memory), expected)

    def test_an_unknown_component_is_refused(self, float_folders):
        with pytest.raises(ValueError, match="trasformer"):
            quantize(PIPELINES["pixart"].build(), TernaryConfig(components=["trasformer"]))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_16_bit_pipelines(self, dtype, float_folders, tmp_path):
        folder = float_folders / "flux"
        pipeline = DiffusionPipeline.from_pretrained(folder, quantization_config=TernaryConfig(), torch_dtype=dtype)
        assert pipeline.transformer.dtype == dtype
        expected = draw("flux", pipeline)
        assert torch.isfinite(expected).all()
        pipeline.save_pretrained(tmp_path)
        again = DiffusionPipeline.from_pretrained(tmp_path, torch_dtype=dtype)
        assert again.transformer.dtype == dtype
        assert torch.equal(draw("flux", again), expected)
        # Without torch_dtype the text encoders come back in 16 bits and the transformer in float32.
        assert torch.isfinite(draw("flux", DiffusionPipeline.from_pretrained(tmp_path))).all()


class TestSize:
    def test_bits_per_weight_from_the_bytes_of_the_file(self, float_folders, tmp_path):
        """Flux at group 128: all tensors of all converted layers, biases not counted, divided by their weights."""
        pipeline = DiffusionPipeline.from_pretrained(float_folders / "flux", quantization_config=TernaryConfig())
        pipeline.transformer.save_pretrained(tmp_path)
        packed = {
            name: module.in_features * module.out_features
            for name, module in pipeline.transformer.named_modules()
            if isinstance(module, TernaryLinear)
        }
        assert len(packed) == 20
        stored = 0
        with safe_open(tmp_path / "diffusion_pytorch_model.safetensors", framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                layer, _, suffix = name.rpartition(".")
                if layer in packed and suffix != "bias":
                    tensor = handle.get_tensor(name)
                    stored += tensor.numel() * tensor.element_size()
        bits = 8 * stored / sum(packed.values())
        assert 1.6 < bits <= 1.75

    def test_the_log_says_what_was_done(self, caplog):
        caplog.set_level("INFO", logger="diffusers_ternary")
        quantize(denoisers.flux(), TernaryConfig(overrides={"*.norm1.linear": "int8"}))
        (line,) = [record.message for record in caplog.records if "layers at" in record.message]
        assert line.startswith("FluxTransformer2DModel: 19 ternary, 1 int8 layers at ")
        assert re.search(r"\d\.\d{3} bits per weight", line)
        assert "outside the repeated blocks" in line


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    torch.manual_seed(0)
    denoisers.wan().save_pretrained(folder)
    return folder


class TestWan:
    """Wan keeps modules in float32 whatever torch_dtype says."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_kept_in_float32(self, wan_folder, dtype, tmp_path):
        float_model = WanTransformer3DModel.from_pretrained(wan_folder, torch_dtype=dtype)
        model = WanTransformer3DModel.from_pretrained(
            wan_folder, quantization_config=TernaryConfig(), torch_dtype=dtype
        )
        dtypes = {name: parameter.dtype for name, parameter in float_model.named_parameters()}
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                assert parameter.dtype == dtypes[name], name
        assert model.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
        expected = predict(model)
        model.save_pretrained(tmp_path)
        again = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=dtype)
        assert {n: p.dtype for n, p in again.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}
        assert torch.equal(predict(again), expected)
