# SPDX-License-Identifier: Apache-2.0
"""Adapters on a ternary denoiser while it is compiled, offloaded, hotswapped, in 16 bits, with rounded activations."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from diffusers import SanaTransformer2DModel
from peft import LoraConfig

from diffusers_ternary import TernaryConfig, quantize
from diffusers_ternary.layers import QuantizedLayer
from diffusers_ternary.lora import TernaryLoraLinear
from integration_tests.support import denoisers
from integration_tests.support.adapters import (
    EXACT,
    Subject,
    difference,
    lora_state,
    packed_names,
    ternary_subject,
    with_prefix,
)
from integration_tests.support.pipelines import PIPELINES, draw


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def original() -> Subject:
    return ternary_subject("flux")


def load(subject: Subject, original: Subject, *, rank: int = 4, seed: int = 1, name: str = "style", **options):
    state = lora_state(original.denoiser, rank=rank, seed=seed, names=packed_names(original.denoiser))
    subject.pipeline.load_lora_weights(with_prefix(state, subject.component), adapter_name=name, **options)
    return subject


class TestCompiled:
    def test_one_graph(self, original):
        subject = load(original.twin(), original)
        expected = subject.run()
        subject.denoiser.compile(fullgraph=True, backend="aot_eager")
        assert difference(subject.run(), expected) < 1e-5

    def test_hotswap_without_recompilation(self, original):
        """Of ranks 4 and 8, into a graph that was compiled once."""
        subject = original.twin()
        subject.pipeline.enable_lora_hotswap(target_rank=8)
        load(subject, original, rank=4, seed=1)
        torch._dynamo.reset()
        subject.denoiser.compile(fullgraph=True, backend="aot_eager")
        for rank, seed in ((4, 1), (8, 2), (2, 3)):
            with torch._dynamo.config.patch(error_on_recompile=seed > 1):
                if seed > 1:
                    load(subject, original, rank=rank, seed=seed, hotswap=True)
                actual = subject.run()
            expected = load(original.twin(), original, rank=rank, seed=seed).run()
            assert difference(actual, expected) < 1e-5

    def test_fused(self, original):
        subject = load(original.twin(), original)
        expected = subject.run()
        subject.pipeline.fuse_lora()
        torch._dynamo.reset()
        subject.denoiser.compile(fullgraph=True, backend="aot_eager")
        assert difference(subject.run(), expected) < 1e-4


class TestOffloaded:
    """On a CPU the hooks run all the same; weights wait on the meta device or are moved from CPU to CPU."""

    @pytest.fixture
    def expected(self, original):
        return load(original.twin(), original).run()

    @pytest.fixture
    def subject(self, original):
        """Offloads to and from the CPU, also when diffusers enables it again after loading an adapter."""

        class OnCpu(type(original.pipeline)):
            def enable_model_cpu_offload(self, gpu_id=None, device="cpu"):
                super().enable_model_cpu_offload(gpu_id, device)

            def enable_sequential_cpu_offload(self):
                # diffusers asks for "cpu:0", to which accelerate cannot move a parameter from "cpu".
                cpu_offload(self.transformer, torch.device("cpu"))

        twin = original.twin()
        parts = {name: copy.deepcopy(part) for name, part in twin.pipeline.components.items()}
        return Subject(OnCpu(**parts), twin.component, twin.call)

    @pytest.mark.parametrize("first", ["adapter", "offload"])
    def test_model_offload(self, original, subject, expected, first):
        if first == "adapter":
            load(subject, original)
        subject.pipeline.enable_model_cpu_offload()
        if first == "offload":
            load(subject, original)
        assert difference(subject.run(), expected) < 1e-6
        subject.pipeline.fuse_lora()
        assert difference(subject.run(), expected) < 1e-4
        subject.pipeline.unfuse_lora()
        assert difference(subject.run(), expected) < 1e-6
        subject.pipeline.remove_all_hooks()

    @pytest.mark.parametrize("first", ["adapter", "offload"])
    def test_sequential_offload(self, original, subject, expected, first):
        if first == "adapter":
            load(subject, original)
        subject.pipeline.enable_sequential_cpu_offload()
        if first == "offload":
            load(subject, original)
        layers = [m for m in subject.denoiser.modules() if isinstance(m, QuantizedLayer)]
        assert layers
        assert all(parameter.is_meta for layer in layers for parameter in layer.parameters())
        assert difference(subject.run(), expected) < 1e-6
        with pytest.raises(ValueError, match=r"not in memory \(sequential CPU offload.*remove_all_hooks"):
            subject.pipeline.fuse_lora()
        subject.pipeline.remove_all_hooks()
        subject.pipeline.fuse_lora()
        assert difference(subject.run(), expected) < 1e-4

    @pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
    @pytest.mark.parametrize("first", ["adapter", "offload"])
    def test_group_offload(self, original, expected, offload_type, first):
        subject = original.twin()
        if first == "adapter":
            load(subject, original)
        blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
        subject.denoiser.enable_group_offload(torch.device("cpu"), offload_type=offload_type, **blocks)
        if first == "offload":
            load(subject, original)
        assert difference(subject.run(), expected) < 1e-6
        subject.pipeline.fuse_lora()
        assert difference(subject.run(), expected) < 1e-4
        subject.pipeline.unfuse_lora()
        assert difference(subject.run(), expected) < 1e-6
        load(subject, original, rank=2, seed=5, name="person")
        subject.pipeline.delete_adapters("person")
        subject.pipeline.set_adapters("style")
        assert difference(subject.run(), expected) < 1e-6

    @pytest.mark.parametrize("offload", ["model", "block_level", "leaf_level"])
    def test_fusing_over_what_was_fused_and_unloaded(self, original, subject, expected, offload):
        if offload == "model":
            subject.pipeline.enable_model_cpu_offload()
        else:
            blocks = {"num_blocks_per_group": 1} if offload == "block_level" else {}
            subject.denoiser.enable_group_offload(torch.device("cpu"), offload_type=offload, **blocks)
        load(subject, original)
        subject.pipeline.fuse_lora()
        subject.pipeline.unload_lora_weights()
        style = subject.run()
        assert difference(style, expected) < 1e-4
        load(subject, original, rank=2, seed=5, name="person")
        both = subject.run()
        assert difference(both, style) > 0.005
        subject.pipeline.fuse_lora()
        assert difference(subject.run(), both) < 1e-4
        subject.pipeline.unfuse_lora()
        assert torch.equal(subject.run(), both)
        subject.pipeline.unload_lora_weights()
        assert torch.equal(subject.run(), style)

    def test_fusing_looks_at_group_offloading_again(self, original):
        """With streams, diffusers keeps a list of the tensors to move, which fusing makes longer."""
        subject = load(original.twin(), original)
        subject.denoiser.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
        layer = next(m for m in subject.denoiser.modules() if isinstance(m, QuantizedLayer))
        before = layer._diffusers_hook.get_hook("group_offloading")
        subject.pipeline.fuse_lora()
        assert layer._diffusers_hook.get_hook("group_offloading") is not before


def test_rounded_activations(original):
    """A8 changes the packed product only: the adapter's effect is that on the dequantized model."""
    config = TernaryConfig(group_size=32, activation_dtype="int8")
    subject = ternary_subject("flux", config)
    plain = subject.run()
    dense = subject.twin(dequantized=True)
    for one in (subject, dense):
        load(one, original)
    error, effect = difference(subject.run(), dense.run()), difference(subject.run(), plain)
    assert 0 < error < 0.02
    assert effect > 5 * error


@pytest.mark.parametrize("options", [{"hadamard": 32}, {"rank": 4}, {"hadamard": 32, "rank": 4}], ids=str)
def test_rotation_and_low_rank_correction(original, options):
    subject = ternary_subject("flux", TernaryConfig(group_size=32, activation_dtype="none", **options))
    dense = subject.twin(dequantized=True)
    for one in (subject, dense):
        load(one, original)
    before = subject.run()
    assert difference(before, dense.run()) < 1e-4
    subject.pipeline.fuse_lora()
    assert difference(subject.run(), before) < 1e-4
    subject.pipeline.unfuse_lora()
    assert torch.equal(subject.run(), before)


def test_a_16_bit_model_has_16_bit_adapters(original):
    pipeline = PIPELINES["flux"].build()
    pipeline.transformer.to(torch.bfloat16).eval()
    quantize(pipeline.transformer, EXACT)
    state = lora_state(original.denoiser, rank=4, seed=1)
    pipeline.load_lora_weights(with_prefix(state, "transformer"), adapter_name="style")
    dtypes = {p.dtype for name, p in pipeline.transformer.named_parameters() if ".lora_" in name}
    assert dtypes == {torch.bfloat16}
    assert pipeline.transformer.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_loaded_layers_know_the_dtype_of_the_model(dtype, tmp_path):
    """SANA's projections have no bias that would show it; new adapters follow it."""
    denoisers.sana().save_pretrained(tmp_path / "float")
    model = SanaTransformer2DModel.from_pretrained(
        tmp_path / "float", quantization_config=TernaryConfig(), torch_dtype=dtype
    )
    model.save_pretrained(tmp_path / "packed")
    for one in (model, SanaTransformer2DModel.from_pretrained(tmp_path / "packed", torch_dtype=dtype)):
        layers = [module for module in one.modules() if isinstance(module, QuantizedLayer)]
        assert any(layer.bias is None for layer in layers)
        assert {layer.float_dtype for layer in layers} == {dtype}


def test_scale_of_a_call(original):
    """`joint_attention_kwargs={"scale": ...}`, as of any LoRA."""
    subject = load(original.twin(), original)
    full = subject.run()
    subject.call["joint_attention_kwargs"] = {"scale": 0.0}
    try:
        assert torch.equal(subject.run(), original.run())
    finally:
        subject.call["joint_attention_kwargs"] = {}
    assert torch.equal(subject.run(), full)


def test_dora_on_a_denoiser(original):
    subject, dense = original.twin(), original.twin(dequantized=True)
    targets = packed_names(original.denoiser)
    for one in (subject, dense):
        torch.manual_seed(0)
        config = LoraConfig(r=4, use_dora=True, init_lora_weights=False, target_modules=targets)
        one.denoiser.add_adapter(config)
    assert difference(subject.run(), dense.run()) < 1e-4
    assert difference(subject.run(), original.run()) > 0.01


class TestTextEncoders:
    @staticmethod
    def pipelines():
        """A Flux pipeline with ternary CLIP and T5, and the same dequantized; in eval mode."""
        pipeline = PIPELINES["flux"].build()
        for part in (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.vae):
            part.eval()
        components = ["transformer", "text_encoder", "text_encoder_2"]
        quantize(pipeline, TernaryConfig(group_size=32, activation_dtype="none", components=components))
        twin = type(pipeline)(**{name: copy.deepcopy(part) for name, part in pipeline.components.items()})
        for name in components:
            getattr(twin, name).dequantize()
        return pipeline, twin

    def test_one_file_for_denoiser_and_text_encoder(self):
        pipeline, twin = self.pipelines()
        packed = packed_names(pipeline.transformer)
        names = [name for name in packed_names(pipeline.text_encoder) if name.endswith(("q_proj", "fc1"))]
        state = {
            **with_prefix(lora_state(pipeline.transformer, rank=4, seed=1, names=packed), "transformer"),
            **with_prefix(lora_state(pipeline.text_encoder, rank=4, seed=2, names=names), "text_encoder"),
        }
        plain = draw("flux", pipeline)
        for one in (pipeline, twin):
            one.load_lora_weights(dict(state), adapter_name="style")
        assert sum(isinstance(m, TernaryLoraLinear) for m in pipeline.text_encoder.modules()) == len(names) > 0
        actual = draw("flux", pipeline)
        assert difference(actual, draw("flux", twin)) < 1e-4
        pipeline.set_adapters("style", {"text_encoder": 0.0, "transformer": 1.0})
        twin.set_adapters("style", {"text_encoder": 0.0, "transformer": 1.0})
        without_text = draw("flux", pipeline)
        assert difference(without_text, draw("flux", twin)) < 1e-4
        assert not torch.equal(without_text, actual)
        pipeline.set_adapters("style")
        pipeline.fuse_lora(components=["transformer", "text_encoder"])
        assert difference(draw("flux", pipeline), actual) < 1e-4
        pipeline.unfuse_lora()
        assert difference(draw("flux", pipeline), actual) < 1e-6
        pipeline.unload_lora_weights()
        assert torch.equal(draw("flux", pipeline), plain)

    def test_t5_by_transformers(self):
        pipeline, twin = self.pipelines()
        tokens = torch.arange(8)[None]
        outputs = []
        for one in (pipeline, twin):
            torch.manual_seed(0)
            lora = LoraConfig(r=2, init_lora_weights=False, target_modules=["q", "wo"])
            one.text_encoder_2.add_adapter(lora)
            outputs.append(one.text_encoder_2(tokens).last_hidden_state)
        assert difference(*outputs) < 1e-5
        plain = self.pipelines()[0].text_encoder_2(tokens).last_hidden_state
        assert difference(outputs[0], plain) > 0.01
