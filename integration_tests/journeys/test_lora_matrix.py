# SPDX-License-Identifier: Apache-2.0
"""Pipeline class × LoRA operation: on a ternary denoiser, and the same on the dequantized one."""

import copy
import dataclasses
import json
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from diffusers_ternary.layers import QuantizedLayer
from diffusers_ternary.lora import TernaryLoraConv2d, TernaryLoraLinear
from integration_tests.support.adapters import (
    Subject,
    difference,
    lora_state,
    packed_names,
    ternary_subject,
    with_prefix,
)
from integration_tests.support.fresh_process import run_python


pytestmark = pytest.mark.usefixtures("one_thread")
PIPELINES = ["flux", "sd3", "sana", "qwen_image", "z_image", "sdxl", "wan"]
# float32 sums in another order; the adapters change the prediction by fifty times as much.
TOLERANCE = 1e-4
VISIBLE = 0.005


@pytest.fixture(scope="module")
def originals():
    """Every ternary pipeline, made once; tests work on copies."""
    return {name: ternary_subject(name) for name in [*PIPELINES, "pixart"]}


@dataclasses.dataclass
class Pair:
    """A ternary pipeline and the dequantized one, to which the same is done.

    Args:
        ternary (`Subject`): what is tested.
        dense (`Subject`): the reference.
        plain (`torch.Tensor`): the prediction without adapters.
        base (`nn.Module`): a ternary denoiser that stays as it is.
    """

    ternary: Subject
    dense: Subject
    plain: torch.Tensor
    base: torch.nn.Module

    def do(self, operation: Callable[[Subject], object]) -> None:
        operation(self.ternary)
        operation(self.dense)

    def load(self, name: str, *, rank: int, seed: int, names: list[str] | None = None, **options: object) -> None:
        state = with_prefix(lora_state(self.base, rank=rank, seed=seed, names=names), self.ternary.component)
        self.do(lambda s: s.pipeline.load_lora_weights(dict(state), adapter_name=name, **options))

    @property
    def packed(self) -> list[str]:
        return packed_names(self.base)

    def check(self, *, changed: bool = True) -> torch.Tensor:
        """Both predict the same, and (not) what they predict without adapters."""
        actual, expected = self.ternary.run(), self.dense.run()
        assert difference(actual, expected) < TOLERANCE
        if changed:
            assert difference(actual, self.plain) > VISIBLE
        else:
            assert torch.equal(actual, self.plain)
        return actual


@pytest.fixture
def pair(request, originals):
    original = originals[request.param]
    ternary, dense = original.twin(), original.twin(dequantized=True)
    return Pair(ternary, dense, original.run(), original.denoiser)


each_pipeline = pytest.mark.parametrize("pair", PIPELINES, indirect=True)


@each_pipeline
class TestPipelines:
    def test_load(self, pair):
        pair.load("style", rank=4, seed=1)
        pair.check()
        adapted = [m for m in pair.ternary.denoiser.modules() if isinstance(m, TernaryLoraLinear | TernaryLoraConv2d)]
        assert len(adapted) == len(pair.packed) > 0

    def test_two_adapters_with_weights(self, pair):
        pair.load("style", rank=4, seed=1)
        first = pair.check()
        pair.load("person", rank=8, seed=2)
        pair.do(lambda s: s.pipeline.set_adapters(["style", "person"], [0.7, 0.4]))
        both = pair.check()
        pair.do(lambda s: s.pipeline.set_adapters(["person"], [1.0]))
        second = pair.check()
        assert difference(first, second) > VISIBLE < difference(both, second)
        assert pair.ternary.pipeline.get_list_adapters() == {pair.ternary.component: ["style", "person"]}

    def test_delete(self, pair):
        pair.load("style", rank=4, seed=1)
        first = pair.check()
        pair.load("person", rank=8, seed=2)
        pair.do(lambda s: s.pipeline.set_adapters(["style", "person"]))
        pair.do(lambda s: s.pipeline.delete_adapters("person"))
        assert torch.equal(pair.check(), first)

    def test_disable_and_enable(self, pair):
        pair.load("style", rank=4, seed=1)
        first = pair.check()
        pair.do(lambda s: s.pipeline.disable_lora())
        pair.check(changed=False)
        pair.do(lambda s: s.pipeline.enable_lora())
        assert torch.equal(pair.check(), first)

    def test_fuse_and_unfuse(self, pair):
        component = pair.ternary.component
        pair.load("style", rank=4, seed=1, names=pair.packed)
        pair.load("person", rank=8, seed=2, names=pair.packed)
        pair.do(lambda s: s.pipeline.set_adapters(["style", "person"], [0.7, 0.4]))
        before, state = pair.check(), copy.deepcopy(pair.ternary.denoiser.state_dict())
        pair.do(lambda s: s.pipeline.fuse_lora(components=[component], lora_scale=0.5))
        assert difference(pair.check(), before) > VISIBLE
        assert pair.ternary.pipeline.fused_loras == {"style", "person"}
        pair.ternary.pipeline.unfuse_lora(components=[component])
        pair.ternary.pipeline.set_adapters(["style", "person"], [0.7, 0.4])
        # Not merely close: a float layer would have lost its last bits to the subtraction.
        assert torch.equal(pair.ternary.run(), before)
        after = pair.ternary.denoiser.state_dict()
        assert after.keys() == state.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in state.items())

    def test_fuse_and_unload_keeps_the_adapter(self, pair):
        pair.load("style", rank=4, seed=1)
        pair.do(lambda s: s.pipeline.fuse_lora(components=[s.component]))
        fused = pair.check()
        pair.do(lambda s: s.pipeline.unload_lora_weights())
        assert torch.equal(pair.check(), fused)

    def test_what_was_fused_and_unloaded_outlives_the_next_adapter(self, pair):
        def fuse(s: Subject) -> None:
            s.pipeline.fuse_lora(components=[s.component])

        pair.load("style", rank=4, seed=1, names=pair.packed)
        pair.do(fuse)
        pair.do(lambda s: s.pipeline.unload_lora_weights())
        style = pair.check()
        pair.load("person", rank=8, seed=2, names=pair.packed)
        both = pair.check()
        pair.do(fuse)
        assert difference(pair.check(), both) < TOLERANCE
        pair.do(lambda s: s.pipeline.unfuse_lora(components=[s.component]))
        assert difference(pair.check(), both) < TOLERANCE
        pair.do(lambda s: s.pipeline.disable_lora())
        assert torch.equal(pair.check(), style)
        pair.do(lambda s: s.pipeline.enable_lora())
        pair.do(fuse)
        pair.do(lambda s: s.pipeline.disable_lora())
        assert torch.equal(pair.check(), style)  # PEFT unfuses on the fly
        pair.do(lambda s: s.pipeline.unload_lora_weights())
        assert torch.equal(pair.check(), style)

    def test_unload(self, pair):
        keys = pair.ternary.denoiser.state_dict().keys()
        pair.load("style", rank=4, seed=1)
        pair.do(lambda s: s.pipeline.unload_lora_weights())
        pair.check(changed=False)
        assert pair.ternary.denoiser.state_dict().keys() == keys

    def test_hotswap(self, pair):
        pair.do(lambda s: s.pipeline.enable_lora_hotswap(target_rank=8))
        pair.load("style", rank=4, seed=1)
        first = pair.check()
        pair.load("style", rank=8, seed=2, hotswap=True)
        assert difference(pair.check(), first) > VISIBLE

    def test_save_and_load_a_file(self, pair, tmp_path):
        pair.load("style", rank=4, seed=1)
        first = pair.check()
        s = pair.ternary
        layers = get_peft_model_state_dict(s.denoiser, adapter_name="style")
        s.pipeline.save_lora_weights(tmp_path, **{f"{s.component}_lora_layers": layers})
        s.pipeline.unload_lora_weights()
        s.pipeline.load_lora_weights(tmp_path, adapter_name="again")
        assert torch.equal(s.run(), first)
        s.pipeline.unload_lora_weights()
        file = next(tmp_path.glob("*.safetensors"))
        s.pipeline.load_lora_weights(str(file), adapter_name="file")
        assert torch.equal(s.run(), first)

    def test_rounded_activations(self, pair):
        """A8 rounds what the packed layers see, not what the adapter sees."""
        for module in pair.ternary.denoiser.modules():
            if isinstance(module, QuantizedLayer):
                module.activation_dtype = "int8"
        rounding = difference(pair.ternary.run(), pair.plain)
        assert 0 < rounding < 0.1
        pair.load("style", rank=4, seed=1)
        actual, expected = pair.ternary.run(), pair.dense.run()
        assert difference(actual, expected) < 2 * rounding
        assert difference(actual, pair.plain) > 2 * difference(actual, expected)

    def test_train_and_save_the_adapter(self, pair, tmp_path):
        denoiser = pair.ternary.denoiser
        denoiser.add_adapter(LoraConfig(r=2, target_modules=pair.packed, init_lora_weights=False), adapter_name="new")
        trainable = [name for name, parameter in denoiser.named_parameters() if parameter.requires_grad]
        assert trainable
        assert all(".lora_" in name for name in trainable)
        expected = pair.ternary.run()
        denoiser.save_lora_adapter(tmp_path, adapter_name="new")
        assert denoiser.is_quantized
        pair.do(lambda s: s.pipeline.unload_lora_weights())
        file = "pytorch_lora_weights.safetensors"
        pair.do(lambda s: s.denoiser.load_lora_adapter(tmp_path, weight_name=file, prefix=None, adapter_name="new"))
        assert torch.equal(pair.check(), expected)


class TestPeftModel:
    """`get_peft_model`, for classes that diffusers gives no LoRA methods."""

    @staticmethod
    def wrapped(original: Subject, *, dequantized: bool) -> tuple[Subject, torch.nn.Module]:
        subject = original.twin(dequantized=dequantized)
        names = packed_names(original.denoiser)
        model = get_peft_model(subject.denoiser, LoraConfig(r=4, target_modules=names), adapter_name="style")
        model.add_adapter("person", LoraConfig(r=2, target_modules=names))
        for seed, (adapter, rank) in enumerate({"style": 4, "person": 2}.items()):
            state = lora_state(original.denoiser, rank=rank, seed=seed, names=names)
            keys = {f"{n.replace('.weight', '')}.{adapter}.weight": tensor for n, tensor in state.items()}
            subject.denoiser.load_state_dict(keys, strict=False)
        return subject, model.eval()

    @pytest.mark.parametrize("name", ["pixart", "sana"])
    def test_operations(self, name, originals):
        original = originals[name]
        plain = original.run()
        (ternary, model), (dense, reference) = (self.wrapped(original, dequantized=d) for d in (False, True))
        for adapter in ("style", "person"):
            for m in (model, reference):
                m.set_adapter(adapter)
            before = ternary.run()
            assert difference(before, dense.run()) < TOLERANCE
            assert difference(before, plain) > VISIBLE
            model.merge_adapter()
            assert difference(ternary.run(), dense.run()) < TOLERANCE
            model.unmerge_adapter()
            assert torch.equal(ternary.run(), before)
            with model.disable_adapter():
                assert torch.equal(ternary.run(), plain)
        merged = dataclasses.replace(ternary, pipeline=copy.copy(ternary.pipeline))
        setattr(merged.pipeline, merged.component, model.merge_and_unload())
        setattr(dense.pipeline, dense.component, reference.merge_and_unload())
        assert difference(merged.run(), before) < TOLERANCE
        assert difference(merged.run(), dense.run()) < TOLERANCE
        # The layers that an adapter changed are float now; nothing of PEFT is left.
        assert not any(isinstance(m, QuantizedLayer) or hasattr(m, "base_layer") for m in merged.denoiser.modules())

    def test_unload_restores_the_model(self, originals):
        original = originals["pixart"]
        ternary, model = self.wrapped(original, dequantized=False)
        setattr(ternary.pipeline, ternary.component, model.unload())
        assert torch.equal(ternary.run(), original.run())
        assert ternary.denoiser.state_dict().keys() == original.denoiser.state_dict().keys()


def test_a_fresh_process_loads_the_packed_pipeline_and_the_adapter(originals, tmp_path):
    """What a user does the next day, for every pipeline class; the prediction is bit-equal."""
    expected = {}
    for name in PIPELINES:
        subject = originals[name].twin()
        subject.denoiser.save_pretrained(tmp_path / name)
        state = with_prefix(lora_state(subject.denoiser, rank=4, seed=1), subject.component)
        save_file(state, tmp_path / name / "lora.safetensors")
        torch.save(subject.call, tmp_path / name / "call.pt")
        subject = Subject(subject.pipeline, subject.component, torch.load(tmp_path / name / "call.pt"))
        subject.pipeline.load_lora_weights(str(tmp_path / name / "lora.safetensors"), adapter_name="style")
        expected[name] = subject.run().tolist()
    actual = run_python(
        """
        import json, sys
        import torch, diffusers_ternary
        from integration_tests.support.adapters import Subject, ternary_subject

        torch.set_num_threads(1)
        results = {}
        for name in json.loads(sys.argv[2]):
            folder = f"{sys.argv[1]}/{name}"
            subject = ternary_subject(name)
            denoiser = type(subject.denoiser).from_pretrained(folder)
            for tensor in [*denoiser.parameters(), *denoiser.buffers()]:
                tensor.data = tensor.data.clone()
            setattr(subject.pipeline, subject.component, denoiser.eval())
            subject = Subject(subject.pipeline, subject.component, torch.load(f"{folder}/call.pt"))
            subject.pipeline.load_lora_weights(f"{folder}/lora.safetensors", adapter_name="style")
            results[name] = subject.run().tolist()
        print(json.dumps(results))
        """,
        tmp_path,
        json.dumps(PIPELINES),
    )
    for name in PIPELINES:
        assert actual[name] == expected[name], name
