# SPDX-License-Identifier: Apache-2.0
"""Models whose weights hooks keep elsewhere, or in another dtype: dequantized, saved and fused like any other."""

import copy
import inspect

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import AlignDevicesHook
from diffusers.hooks import apply_group_offloading, group_offloading, layerwise_casting
from torch import nn

from diffusers_ternary import TernaryConfig, quantize
from diffusers_ternary.backend import compat_offload, packed_layers
from integration_tests.support import denoisers, text_encoders
from integration_tests.support.adapters import lora_state


CPU = torch.device("cpu")


def group(model, folder, **options):
    apply_group_offloading(model, onload_device=CPU, offload_device=CPU, **options)


HOOKS = {
    "accelerate, cpu": lambda model, folder: cpu_offload(model, CPU),
    "accelerate, disk": lambda model, folder: disk_offload(model, str(folder), CPU),
    "groups of leaves": lambda model, folder: group(model, folder, offload_type="leaf_level"),
    "groups of blocks": lambda model, folder: group(model, folder, offload_type="block_level", num_blocks_per_group=1),
    "leaves on disk": lambda model, folder: group(
        model, folder, offload_type="leaf_level", offload_to_disk_path=str(folder)
    ),
    "blocks on disk": lambda model, folder: group(
        model, folder, offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=str(folder)
    ),
}


def is_offloaded(model: nn.Module) -> bool:
    return compat_offload.is_group_offloaded(model) or compat_offload.offloaded_by_accelerate(model)


@torch.no_grad()
def run(model: nn.Module) -> torch.Tensor:
    if hasattr(model, "get_input_embeddings"):
        return model(torch.arange(8)[None]).last_hidden_state
    return denoisers.predict(model, torch.float32)


MODELS = {
    "sd3": lambda: quantize(denoisers.sd3().eval(), TernaryConfig(overrides={"*.ff.*": "int8"}, rank=2)),
    # Not T5: diffusers loses the embedding that it uses twice when leaves go to disk, of float models too.
    "clip": lambda: quantize(text_encoders.clip().eval()),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("hook", HOOKS)
class TestOffloaded:
    def test_dequantized(self, tmp_path, name, hook):
        model = MODELS[name]()
        expected = run(copy.deepcopy(model).dequantize())
        HOOKS[hook](model, tmp_path)
        model.dequantize()
        assert not packed_layers(model)
        assert is_offloaded(model)
        for _ in range(2):  # the second time, every group has been offloaded again
            assert torch.equal(run(model), expected)

    def test_saved(self, tmp_path, name, hook):
        model = MODELS[name]()
        expected = run(model)
        HOOKS[hook](model, tmp_path / "offload")
        if not hook.startswith("groups"):
            run(model)  # has been used
        model.save_pretrained(tmp_path / "saved")
        assert is_offloaded(model)
        assert torch.equal(run(model), expected)
        loaded = type(model).from_pretrained(tmp_path / "saved").eval()
        assert torch.equal(run(loaded), expected)


class TestLoadedWithADeviceMap:
    @pytest.mark.parametrize("what", ["dequantize", "save"])
    def test_with_a_block_on_disk(self, tmp_path, what):
        model = MODELS["sd3"]()
        model.save_pretrained(tmp_path / "packed")
        where = {name: "cpu" for name, _ in model.named_children()}
        where |= {f"transformer_blocks.{index}": place for index, place in enumerate(("disk", "cpu"))}
        del where["transformer_blocks"]
        loaded = type(model).from_pretrained(
            tmp_path / "packed", device_map=where, offload_folder=str(tmp_path / "offload")
        )
        assert torch.equal(run(loaded), run(model))
        if what == "save":
            loaded.save_pretrained(tmp_path / "again")
            assert torch.equal(run(type(model).from_pretrained(tmp_path / "again")), run(model))
        else:
            assert torch.equal(run(loaded.dequantize()), run(model.dequantize()))

    def test_blocks_that_load_as_a_whole_are_refused(self, tmp_path):
        model = MODELS["sd3"]()
        cpu_offload(model, CPU, preload_module_classes=["JointTransformerBlock"])
        with pytest.raises(ValueError, match=r"transformer_blocks\.0 is offloaded as a whole"):
            model.dequantize()
        assert packed_layers(model)


class TestQuantizing:
    @pytest.mark.parametrize("hook", HOOKS)
    def test_an_offloaded_model_is_refused(self, tmp_path, hook):
        model = denoisers.sd3()
        HOOKS[hook](model, tmp_path)
        with pytest.raises(ValueError, match="Quantize before offloading is enabled"):
            quantize(model)
        assert not packed_layers(model)

    def test_a_model_that_is_cast_layer_by_layer_is_refused(self):
        model = denoisers.sd3()
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
        with pytest.raises(ValueError, match="SD3Transformer2DModel stores its weights in 8 bits"):
            quantize(model)
        assert not packed_layers(model)


class TestLayerwiseCasting:
    def test_dequantized_layers_are_cast_like_the_others(self):
        model = quantize(denoisers.sd3().bfloat16().eval())
        weights = {name: layer.dequantize(torch.bfloat16) for name, layer in packed_layers(model).items()}
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
        model.dequantize()
        for name, weight in weights.items():
            layer = model.get_submodule(name)
            if compat_offload.casting_hook(layer) is None:  # by its name, diffusers leaves it alone
                assert torch.equal(layer.weight, weight)
            else:
                assert torch.equal(layer.weight, weight.to(torch.float8_e4m3fn))
        cast = [name for name in weights if compat_offload.casting_hook(model.get_submodule(name)) is not None]
        assert len(cast) > len(weights) / 2
        inputs = {
            "hidden_states": torch.randn(1, 4, 8, 8),
            "encoder_hidden_states": torch.randn(1, 5, 32),
            "pooled_projections": torch.randn(1, 64),
        }
        inputs = {key: value.bfloat16() for key, value in inputs.items()}
        with torch.no_grad():
            output = model(**inputs, timestep=torch.tensor([1.0]))[0]
        assert output.dtype == torch.bfloat16
        assert bool(output.isfinite().all())


class TestFusing:
    def test_adapters_are_fused_into_weights_on_disk(self, tmp_path):
        model = MODELS["sd3"]()
        reference = copy.deepcopy(model)
        state = lora_state(model, rank=2, seed=0)
        for one in (model, reference):
            one.load_lora_adapter(copy.deepcopy(state), prefix=None, adapter_name="a")
        HOOKS["leaves on disk"](model, tmp_path)
        for one in (model, reference):
            one.fuse_lora(adapter_names=["a"])
        assert torch.equal(run(model), run(reference))
        for one in (model, reference):
            one.unfuse_lora()
        assert torch.equal(run(model), run(reference))


class TestHosts:
    def test_diffusers_reuses_the_files_of_another_model(self, tmp_path):
        """Of a float model: the host loses its weights, and ours would be lost as well. We say so."""
        first, second = nn.Sequential(nn.Linear(4, 4, bias=False)), nn.Sequential(nn.Linear(4, 4))
        HOOKS["leaves on disk"](first, tmp_path)
        HOOKS["leaves on disk"](second, tmp_path)
        with pytest.raises(KeyError):
            second(torch.ones(1, 4))
        with pytest.raises(ValueError, match="its weights are lost"), compat_offload.without_group_offloading(second):
            pass

    def test_private_names(self):
        for name, hook in (
            ("_GROUP_OFFLOADING", "group_offloading"),
            ("_LAYER_EXECUTION_TRACKER", "layer_execution_tracker"),
            ("_LAZY_PREFETCH_GROUP_OFFLOADING", "lazy_prefetch_group_offloading"),
        ):
            assert getattr(group_offloading, name) == hook
        assert layerwise_casting._LAYERWISE_CASTING_HOOK == compat_offload._CASTING_HOOK
        source = inspect.getsource(group_offloading.ModuleGroup)
        assert all(name in source for name in ("safetensors_file_path", "key_to_tensor", "offload_to_disk_path"))
        assert list(inspect.signature(group_offloading._apply_group_offloading).parameters) == ["module", "config"]
        parameters = inspect.signature(AlignDevicesHook.__init__).parameters
        assert {"offload", "weights_map", "place_submodules", "offload_buffers", "skip_keys"} <= set(parameters)
