# SPDX-License-Identifier: Apache-2.0
"""Components of pipelines: below `torch.compile`, and one module under two names."""

import copy

import pytest
import torch
from diffusers import ControlNetModel, DiffusionPipeline, FluxPipeline, MultiControlNetModel, WanPipeline
from torch import nn

from diffusers_ternary import TernaryConfig, evaluate, quantize
from diffusers_ternary.backend import TernaryDiffusersQuantizer, packed_layers, plan_pipeline
from diffusers_ternary.backend.components import denoiser_name, denoiser_of, store_in_16_bits
from diffusers_ternary.calibration import CalibrationConfig, SolverConfig, calibrate
from diffusers_ternary.interop.inspection import inspect_path
from diffusers_ternary.layers import TernaryLinear
from integration_tests.support import denoisers, distillation
from integration_tests.support.more_pipelines import MORE_PIPELINES
from integration_tests.support.pipelines import PIPELINES, draw


def compiled(pipeline: DiffusionPipeline, name: str = "transformer") -> DiffusionPipeline:
    setattr(pipeline, name, torch.compile(getattr(pipeline, name), backend="eager"))
    return pipeline


def built(name: str) -> DiffusionPipeline:
    """In evaluation mode: modules built in memory would still drop out."""
    pipeline = PIPELINES[name].build()
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    return pipeline


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class TestCompiled:
    @pytest.mark.parametrize(("name", "component"), [("flux", "transformer"), ("sdxl", "unet")])
    def test_quantized_and_saved_like_an_uncompiled_one(self, tmp_path, name, component):
        pipeline = compiled(built(name), component)
        before = draw(name, pipeline)  # compiled code of the float layers
        wrapper = getattr(pipeline, component)
        assert quantize(pipeline) is pipeline
        assert getattr(pipeline, component) is wrapper
        plain = copy.deepcopy(wrapper._orig_mod)
        pipeline.save_pretrained(tmp_path)
        assert inspect_path(tmp_path)
        loaded = type(pipeline).from_pretrained(tmp_path)
        assert same_weights(getattr(loaded, component), plain)
        drawn = draw(name, pipeline)
        assert not torch.equal(drawn, before)
        setattr(pipeline, component, wrapper._orig_mod)
        assert torch.equal(draw(name, pipeline), drawn)

    def test_a_model_comes_back_in_its_wrapper(self, tmp_path):
        model = torch.compile(denoisers.pixart(), backend="eager")
        assert quantize(model) is model
        assert packed_layers(model._orig_mod)
        model.save_pretrained(tmp_path)
        assert same_weights(type(model._orig_mod).from_pretrained(tmp_path), model._orig_mod)

    def test_compiled_blocks_are_saved_under_their_own_names(self, tmp_path):
        model = denoisers.pixart()
        plain = quantize(copy.deepcopy(model))
        model.transformer_blocks[1] = torch.compile(model.transformer_blocks[1], backend="eager")
        quantize(model).save_pretrained(tmp_path)
        assert same_weights(type(model).from_pretrained(tmp_path), plain)

    def test_calibrated_and_evaluated(self, tmp_path):
        tiny = PIPELINES["flux"]
        call = {**tiny.call, "height": tiny.size, "width": tiny.size, "num_inference_steps": 2}
        settings = CalibrationConfig(call_kwargs=call, batch_size=2, solver=SolverConfig(descent_passes=1, starts=1))
        plain, wrapped, teacher = built("flux"), compiled(built("flux")), compiled(built("flux"))
        for pipeline in (plain, wrapped):
            calibrate(pipeline, ["a red cat", "a blue dog"], TernaryConfig(), settings)
        assert same_weights(plain.transformer, wrapped.transformer._orig_mod)
        wrapped.save_pretrained(tmp_path)
        assert same_weights(FluxPipeline.from_pretrained(tmp_path).transformer, plain.transformer)
        results = [
            evaluate(student, teacher, ["a red cat"], call_kwargs=call, progress=False) for student in (plain, wrapped)
        ]
        assert results[0].velocity.overall == results[1].velocity.overall > 0

    def test_distilled(self, tmp_path):
        pipelines = [distillation.teacher(), compiled(distillation.teacher())]
        students = [
            distillation.run(tmp_path / str(number), pipeline=pipeline, mode="scales", updates=2)
            for number, pipeline in enumerate(pipelines)
        ]
        assert same_weights(students[0].transformer, students[1].transformer)


class TestOneModuleUnderTwoNames:
    def both(self) -> WanPipeline:
        pipeline = MORE_PIPELINES["wan_2_2"].build()
        return WanPipeline(**{**pipeline.components, "transformer_2": pipeline.transformer}, boundary_ratio=0.5)

    def test_is_quantized_once_and_saved_under_both(self, tmp_path):
        pipeline = self.both()
        assert list(plan_pipeline(pipeline, TernaryConfig())) == ["transformer"]
        quantize(pipeline)
        assert pipeline.transformer is pipeline.transformer_2
        pipeline.save_pretrained(tmp_path)
        loaded = WanPipeline.from_pretrained(tmp_path)
        for name in ("transformer", "transformer_2"):
            assert any(isinstance(part, TernaryLinear) for part in getattr(loaded, name).modules())
            assert same_weights(getattr(loaded, name), pipeline.transformer)

    def test_two_kinds_for_one_module_are_refused_before_anything_changes(self):
        pipeline = self.both()
        config = TernaryConfig(components={"transformer": "ternary", "transformer_2": "int8"})
        with pytest.raises(ValueError, match="transformer and transformer_2 of the WanPipeline are the same module"):
            quantize(pipeline, config)
        assert not packed_layers(pipeline.transformer)

    def test_under_a_wrapper_and_bare(self):
        pipeline = self.both()
        compiled(pipeline, "transformer_2")
        quantize(pipeline)
        assert packed_layers(pipeline.transformer)
        assert pipeline.transformer_2._orig_mod is pipeline.transformer


class TestModelsWithinModels:
    def test_each_of_several_control_networks_is_saved_packed(self, tmp_path):
        unet = denoisers.plain_unet()
        networks = MultiControlNetModel([ControlNetModel.from_unet(unet) for _ in range(2)])
        quantize(networks)
        networks.save_pretrained(str(tmp_path / "control"))
        loaded = MultiControlNetModel.from_pretrained(str(tmp_path / "control"))
        assert len(packed_layers(loaded)) == len(packed_layers(networks)) > 0
        assert same_weights(loaded, networks)
        networks.nets[0].dequantize()
        assert not packed_layers(networks.nets[0])
        assert packed_layers(networks.nets[1])


class TestDeviceMaps:
    @pytest.mark.parametrize("options", [{}, {"kind": "int8"}, {"overrides": {"*.attn.*": "int8"}}, {"rank": 4}])
    @pytest.mark.parametrize(("room", "fits"), [(1.2, True), (0.9, False)])
    def test_auto_is_planned_with_packed_sizes(self, tmp_path, options, room, fits):
        config = TernaryConfig(scale_layout="group", group_size=32, **options)
        model = denoisers.flux().bfloat16()
        model.save_pretrained(tmp_path / "float")
        quantizer = TernaryDiffusersQuantizer(config, pre_quantized=False)
        needed = quantize(model, config).get_memory_footprint()
        load = {"quantization_config": config, "dtype": torch.bfloat16, "device_map": "auto"}
        load |= {"max_memory": {"cpu": int(needed * room)}, "offload_folder": str(tmp_path / "offload")}
        if fits:
            loaded = type(model).from_pretrained(tmp_path / "float", **load)
            assert set(loaded.hf_device_map.values()) == {"cpu"}
            assert loaded.get_memory_footprint() == needed
        else:  # part of it would have to stay on disk, which is refused while quantizing
            with pytest.raises(ValueError, match="device_map puts layers on disk while quantizing"):
                type(model).from_pretrained(tmp_path / "float", **load)
        with torch.device("meta"):
            empty = denoisers.flux().bfloat16()
        quantizer.update_torch_dtype(torch.bfloat16)
        quantizer.preprocess_model(empty, state_dict=None)
        elements = sum(tensor.numel() for tensor in empty.state_dict().values())
        allocated = elements // quantizer.get_cuda_warm_up_factor() * 2
        assert 0.3 * needed < allocated <= needed


def test_the_denoiser_is_what_a_pipeline_calls_at_every_step():
    pipeline = PIPELINES["flux"].build()
    assert denoiser_name(pipeline) == "transformer"
    assert denoiser_of(pipeline) is pipeline.transformer
    assert denoiser_of(pipeline, "text_encoder") is pipeline.text_encoder
    with pytest.raises(ValueError, match=r"FluxPipeline has no unet that is called .*Choose from .*transformer"):
        denoiser_name(pipeline, "unet")


def test_kept_layers_are_stored_in_16_bits_and_nothing_else_changes():
    pipeline = quantize(PIPELINES["flux"].build(), TernaryConfig(group_size=16))
    before = {name: tensor.clone() for name, tensor in pipeline.transformer.state_dict().items()}
    text_encoder = {name: tensor.clone() for name, tensor in pipeline.text_encoder.state_dict().items()}
    store_in_16_bits(pipeline)
    after = pipeline.transformer.state_dict()
    assert {t.dtype for t in before.values() if t.is_floating_point()} == {torch.float32}
    for name, tensor in before.items():
        expected = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
        assert after[name].dtype == expected.dtype
        assert torch.equal(after[name], expected), name
    for name, tensor in pipeline.text_encoder.state_dict().items():
        assert torch.equal(tensor, text_encoder[name])
        assert tensor.dtype == text_encoder[name].dtype


def test_float32_modules_stay_float32_when_stored():
    pipeline = quantize(PIPELINES["flux"].build(), TernaryConfig(group_size=16))
    pipeline.transformer._keep_in_fp32_modules = ["proj_out"]
    store_in_16_bits(pipeline)
    assert pipeline.transformer.proj_out.weight.dtype == torch.float32
    assert pipeline.transformer.x_embedder.weight.dtype == torch.bfloat16
