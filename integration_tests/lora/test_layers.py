# SPDX-License-Identifier: Apache-2.0
"""Adapters on single packed layers, against PEFT's own layers on the dequantized weight."""

import copy
import warnings

import pytest
import torch
from peft import (
    BOFTConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftModel,
    ShiraConfig,
    VeraConfig,
    get_peft_model,
)
from torch import nn

from diffusers_ternary import TernaryConfig, quantize
from diffusers_ternary.layers import QuantizedLayer
from diffusers_ternary.lora import (
    TernaryLoHaConv2d,
    TernaryLoHaLinear,
    TernaryLoKrConv2d,
    TernaryLoKrLinear,
    TernaryLoraConv2d,
    TernaryLoraLinear,
)


LINEAR, CONV, POINTWISE = "linear", "conv", "pointwise"
# float32 sums in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class Block(nn.Module):
    """A linear layer, a convolution and a 1x1 convolution, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(36, 8, bias=False)
        self.conv = nn.Conv2d(2, 12, 3, padding=1)
        self.pointwise = nn.Conv2d(12, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x).view(-1, 2, 4, 4)  # [B, 16, 36] -> [4 B, 2, 4, 4]
        return self.pointwise(torch.nn.functional.silu(self.conv(y)))


def config(kind: str = "ternary", **options: object) -> TernaryConfig:
    return TernaryConfig(group_size=12, activation_dtype="none", overrides={"*": kind}, **options)


def make(kind: str = "ternary", dtype: torch.dtype = torch.float32, **options: object) -> tuple[nn.Module, nn.Module]:
    """A packed model and the float model of the same effective weights."""
    torch.manual_seed(0)
    packed = quantize(Block().to(dtype).eval(), config(kind, **options))
    dense = copy.deepcopy(packed)
    for name, module in list(dense.named_modules()):
        if isinstance(module, QuantizedLayer):
            dense.set_submodule(name, module.to_float(dtype))
    return packed, dense


def inputs(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 16, 36, generator=torch.Generator().manual_seed(1)).to(dtype)


def randomize(model: nn.Module, seed: int = 2) -> None:
    """Gives every adapter weight a value: they start at zero effect."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if any(part in name for part in ("lora_A", "lora_B", "hada_", "lokr_")):
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.3).to(parameter.dtype)


def adapted(config_of: object, **options: object) -> tuple[PeftModel, PeftModel]:
    """Both models of [`make`] with the same adapter."""
    models = make(**options)
    wrapped = []
    for model in models:
        torch.manual_seed(3)
        peft_model = get_peft_model(model, copy.deepcopy(config_of))
        randomize(peft_model)
        wrapped.append(peft_model.eval())
    return wrapped[0], wrapped[1]


TARGETS = [LINEAR, CONV, POINTWISE]
CONFIGS = {
    "lora": LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS),
    "rslora": LoraConfig(r=4, use_rslora=True, target_modules=TARGETS),
    "lora_bias": LoraConfig(r=4, lora_bias=True, target_modules=[CONV, POINTWISE]),
    "dora": LoraConfig(r=4, use_dora=True, target_modules=TARGETS),
    "mica": LoraConfig(r=4, init_lora_weights="mica", target_modules=[LINEAR]),
    "orthogonal": LoraConfig(r=4, init_lora_weights="orthogonal", target_modules=[LINEAR]),
    "eva": LoraConfig(r=4, init_lora_weights="eva", target_modules=[LINEAR]),
    "loha": LoHaConfig(r=4, alpha=4, target_modules=TARGETS),
    "lokr": LoKrConfig(r=2, alpha=2, target_modules=TARGETS),
}
each_method = pytest.mark.parametrize("method", CONFIGS)


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


@each_method
@pytest.mark.parametrize("kind", ["ternary", "int8"])
@pytest.mark.usefixtures("no_gradients")
class TestMethods:
    def test_forward(self, method, kind):
        packed, dense = adapted(CONFIGS[method], kind=kind)
        actual, expected = packed(inputs()), dense(inputs())
        torch.testing.assert_close(actual, expected, **CLOSE)
        with packed.disable_adapter():
            plain = packed(inputs())
        assert not torch.allclose(plain, actual, atol=1e-2)
        assert torch.equal(plain, make(kind)[0](inputs()))

    def test_merge_and_unmerge(self, method, kind):
        packed, dense = adapted(CONFIGS[method], kind=kind)
        before, state = packed(inputs()), copy.deepcopy(packed.state_dict())
        packed.merge_adapter()
        torch.testing.assert_close(packed(inputs()), dense(inputs()), **CLOSE)
        packed.unmerge_adapter()
        after = packed.state_dict()
        assert after.keys() == state.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in state.items())
        assert torch.equal(packed(inputs()), before)

    def test_merge_and_unload(self, method, kind):
        packed, dense = adapted(CONFIGS[method], kind=kind)
        before = packed(inputs())
        merged = packed.merge_and_unload(safe_merge=True)
        torch.testing.assert_close(merged(inputs()), before, **CLOSE)
        expected = dense.merge_and_unload()
        for name in packed.peft_config["default"].target_modules:
            layer, reference = merged.get_submodule(name), expected.get_submodule(name)
            assert type(layer) is type(reference)
            torch.testing.assert_close(layer.weight, reference.weight, **CLOSE)


@torch.no_grad()
def test_the_classes():
    expected = {
        "lora": (TernaryLoraLinear, TernaryLoraConv2d),
        "loha": (TernaryLoHaLinear, TernaryLoHaConv2d),
        "lokr": (TernaryLoKrLinear, TernaryLoKrConv2d),
    }
    for method, (linear, conv) in expected.items():
        model = adapted(CONFIGS[method])[0].base_model.model
        assert type(model.linear) is linear
        assert type(model.conv) is type(model.pointwise) is conv


@pytest.mark.parametrize("options", [{"hadamard": 4}, {"rank": 2}, {"hadamard": 4, "rank": 2}], ids=str)
@torch.no_grad()
def test_rotation_and_low_rank_correction(options):
    packed, dense = adapted(LoraConfig(r=4, use_dora=True, target_modules=[LINEAR]), **options)
    assert packed.base_model.model.linear.base_layer.spec.hadamard == options.get("hadamard", 0)
    torch.testing.assert_close(packed(inputs()), dense(inputs()), **CLOSE)
    packed.merge_adapter()
    torch.testing.assert_close(packed(inputs()), dense(inputs()), **CLOSE)


@pytest.mark.parametrize("method", ["lora", "dora", "loha", "lokr"])
@pytest.mark.parametrize("options", [{}, {"hadamard": 4, "rank": 2}], ids=["plain", "rotated, corrected"])
def test_gradients_equal_those_on_the_dequantized_base(method, options):
    """In float64, to the last digits: of the adapter, and of the input."""
    packed, dense = adapted(CONFIGS[method], **options)
    gradients = []
    for model in (packed.double().train(), dense.double().train()):
        x = inputs(torch.float64).requires_grad_()
        model(x).square().sum().backward()
        adapter = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert adapter
        gradients.append({**adapter, "x": x.grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        # Rotated and corrected weights, and those that DoRA takes the norms of, are formed in float32.
        close = {"rtol": 1e-5, "atol": 1e-5} if options or method == "dora" else {"rtol": 1e-10, "atol": 1e-10}
        torch.testing.assert_close(gradient, gradients[1][name], **close)
    assert not any(p.requires_grad for n, p in packed.named_parameters() if "base_layer" in n)


@torch.no_grad()
def test_rounded_activations_meet_the_unrounded_adapter():
    """A8: only the packed product sees rounded activations."""
    packed, dense = adapted(CONFIGS["lora"])
    for module in packed.modules():
        if isinstance(module, QuantizedLayer):
            module.activation_dtype = "int8"
    actual, expected = packed(inputs()), dense(inputs())
    with packed.disable_adapter():
        effect = (packed(inputs()) - actual).norm()
    assert 0 < (actual - expected).norm() < 0.05 * effect


@pytest.mark.usefixtures("no_gradients")
class TestSeveral:
    @staticmethod
    def two(method: str = "lora") -> tuple[PeftModel, PeftModel]:
        packed, dense = adapted(CONFIGS[method])
        for model in (packed, dense):
            model.add_adapter("second", copy.deepcopy(CONFIGS[method]))
            randomize(model, seed=4)
            model.base_model.set_adapter(["default", "second"])
        return packed, dense

    @pytest.mark.parametrize("method", ["lora", "dora", "loha"])
    def test_active_and_merged_together(self, method):
        packed, dense = self.two(method)
        before = packed(inputs())
        torch.testing.assert_close(before, dense(inputs()), **CLOSE)
        packed.merge_adapter()
        dense.merge_adapter()
        torch.testing.assert_close(packed(inputs()), dense(inputs()), **CLOSE)
        packed.unmerge_adapter()
        assert torch.equal(packed(inputs()), before)

    def test_merged_one_after_the_other(self):
        packed, dense = self.two()
        before = packed(inputs())
        for name in ("second", "default"):
            packed.merge_adapter([name])
        torch.testing.assert_close(packed(inputs()), dense(inputs()), **CLOSE)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            packed.merge_adapter(["second"])  # merged already: PEFT warns and does nothing
        torch.testing.assert_close(packed(inputs()), dense(inputs()), **CLOSE)
        packed.unmerge_adapter()
        assert torch.equal(packed(inputs()), before)

    def test_mixed_in_one_batch(self):
        packed, dense = adapted(LoraConfig(r=4, target_modules=[LINEAR]))
        names = ["default", "__base__"]
        for model in (packed, dense):
            model.base_model.model.forward = lambda x, model=model: model.base_model.model.linear(x)
        torch.testing.assert_close(
            packed(inputs(), adapter_names=names), dense(inputs(), adapter_names=names), **CLOSE
        )

    def test_unloading_while_merged_keeps_the_adapters(self):
        packed, _ = self.two()
        before = packed(inputs())
        packed.merge_adapter()
        torch.testing.assert_close(packed.unload()(inputs()), before, **CLOSE)

    @pytest.mark.parametrize("kind", ["ternary", "int8"])
    @pytest.mark.parametrize("method", ["lora", "lora_bias", "dora", "loha", "lokr"])
    def test_merging_over_what_was_merged_and_unloaded(self, method, kind):
        packed, dense = adapted(CONFIGS[method], kind=kind)
        for model in (packed, dense):
            model.merge_adapter()
        packed, dense = packed.unload(), dense.unload()
        first = packed(inputs())
        models = [get_peft_model(model, copy.deepcopy(CONFIGS[method])).eval() for model in (packed, dense)]
        for model in models:
            randomize(model, seed=5)
        before = models[0](inputs())
        torch.testing.assert_close(before, models[1](inputs()), **CLOSE)
        assert (before - first).norm() > 0.01 * first.norm()
        for _ in range(2):
            for model in models:
                model.merge_adapter()
            torch.testing.assert_close(models[0](inputs()), models[1](inputs()), **CLOSE)
            models[0].unmerge_adapter()
            models[1].unmerge_adapter()
            assert torch.equal(models[0](inputs()), before)
        assert torch.equal(models[0].unload()(inputs()), first)

    def test_a_merged_adapter_that_is_deleted_stays(self):
        packed, dense = self.two()
        for model in (packed, dense):
            model.merge_adapter()
        both = packed(inputs())
        for module in packed.modules():
            if isinstance(module, TernaryLoraLinear | TernaryLoraConv2d):
                module.delete_adapter("default")  # as diffusers' delete_adapters does
        torch.testing.assert_close(packed(inputs()), both, **CLOSE)
        packed.unmerge_adapter()
        dense.unmerge_adapter()
        dense.merge_adapter(["default"])
        with dense.disable_adapter():
            pass
        packed.base_model.disable_adapter_layers()
        torch.testing.assert_close(packed(inputs()), dense.unload()(inputs()), **CLOSE)

    def test_a_copied_model_unmerges_for_itself(self):
        packed, _ = self.two()
        packed.merge_adapter(["default"])
        model = packed.unload()
        first = model(inputs())
        wrapped = get_peft_model(model, copy.deepcopy(CONFIGS["lora"]))
        randomize(wrapped, seed=6)
        wrapped.merge_adapter()
        twin = copy.deepcopy(wrapped)
        wrapped.unmerge_adapter()
        twin.unmerge_adapter()
        assert torch.equal(twin.unload()(inputs()), first)
        assert torch.equal(wrapped.unload()(inputs()), first)

    def test_casts_of_the_model_reach_what_is_restored(self):
        packed, _ = self.two()
        packed.merge_adapter()
        wrapped = get_peft_model(packed.unload(), copy.deepcopy(CONFIGS["lora"]))
        wrapped.merge_adapter()
        wrapped.to(torch.bfloat16)
        wrapped.unmerge_adapter()
        layers = [module for module in wrapped.modules() if isinstance(module, QuantizedLayer)]
        assert {layer.fused_weight.dtype for layer in layers} == {torch.bfloat16}

    def test_dequantizing_under_an_adapter(self):
        packed, dense = self.two()
        model = packed.base_model.model
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantizedLayer):
                model.set_submodule(name, module.to_float())
        torch.testing.assert_close(packed(inputs()), dense(inputs()), **CLOSE)
        packed.merge_adapter()
        torch.testing.assert_close(packed(inputs()), dense(inputs()), **CLOSE)
        packed.unmerge_adapter()
        torch.testing.assert_close(packed(inputs()), dense(inputs()), **CLOSE)


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("method", ["lora", "dora", "loha"])
    @torch.no_grad()
    def test_new_adapters_get_the_dtype_of_the_model(self, dtype, method):
        options = {"target_modules": [LINEAR]}
        models = make(dtype=dtype)
        for model in models:
            get_peft_model(model, type(CONFIGS[method])(r=4, **options), autocast_adapter_dtype=False)
            randomize(model)
        packed, dense = ({p.dtype for n, p in m.named_parameters() if "base" not in n} for m in models)
        assert {dtype} <= packed
        assert packed - {torch.int8, torch.int16, torch.uint8} == dense
        actual, expected = (model(inputs(dtype)) for model in models)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, expected, rtol=5e-2, atol=5e-2)

    def test_the_dtype_follows_casts_of_the_model(self):
        packed, _ = make()
        assert packed.linear.float_dtype == torch.float32
        packed.to(torch.bfloat16)
        assert packed.linear.float_dtype == packed.conv.float_dtype == torch.bfloat16
        assert quantize(Block(), config(compute_dtype="float16")).linear.float_dtype == torch.float16

    def test_a_fused_weight_has_it_too(self):
        packed, _ = make(dtype=torch.bfloat16)
        model = get_peft_model(packed, LoraConfig(r=2, target_modules=[LINEAR]))
        model.merge_adapter()
        assert packed.linear.base_layer.fused_weight.dtype == torch.bfloat16
        packed.to(torch.float32)
        assert packed.linear.base_layer.fused_weight.dtype == torch.float32

    def test_autocast(self):
        packed, dense = adapted(CONFIGS["lora"])
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            actual, expected = packed(inputs()), dense(inputs())
        assert actual.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(actual, expected, rtol=5e-2, atol=5e-2)


class TestRefusals:
    @pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora", "corda", "lora_ga"])
    @pytest.mark.parametrize("target", [LINEAR, POINTWISE])
    def test_initializations_that_change_the_base_weight(self, init, target):
        options = {}
        if init == "lora_ga":
            from peft import LoraGAConfig

            options["lora_ga_config"] = LoraGAConfig()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a default CorDA config is used
            lora = LoraConfig(r=2, target_modules=[target], init_lora_weights=init, **options)
        packed, _ = make()
        with pytest.raises(ValueError, match=rf"init_lora_weights='{init}' subtracts.*'gaussian'"):
            get_peft_model(packed, lora)

    def test_loftq(self):
        pytest.importorskip("scipy")
        lora = LoraConfig(r=2, target_modules=[LINEAR], init_lora_weights="loftq", loftq_config={"loftq_bits": 4})
        with pytest.raises(ValueError, match=r"subtracts.*TernaryConfig\(rank="):
            get_peft_model(make()[0], lora)

    def test_variants_that_change_the_base_weight(self):
        from peft import KasaConfig

        lora = LoraConfig(r=2, target_modules=[LINEAR], kasa_config=KasaConfig())
        with pytest.raises(ValueError, match="unsupported variant"):
            get_peft_model(make()[0], lora)

    def test_target_parameters(self):
        lora = LoraConfig(r=2, target_modules=[], target_parameters=["linear.weight"])
        with pytest.raises(ValueError, match="Name the layer in target_modules"):
            get_peft_model(make()[0], lora)

    def test_safe_merge_of_a_broken_adapter(self):
        packed, _ = adapted(CONFIGS["lora"])
        packed.base_model.model.linear.lora_A["default"].weight.data[0, 0] = float("nan")
        with pytest.raises(ValueError, match="NaN or Inf in the merged weight: the adapter 'default'"):
            packed.merge_adapter(safe_merge=True)
        assert not packed.base_model.model.linear.base_layer.is_fused

    def test_a_bias_for_a_layer_without_one(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            packed, _ = adapted(LoraConfig(r=2, lora_bias=True, target_modules=[LINEAR]))
        with pytest.raises(RuntimeError, match="its base has none"):
            packed.merge_adapter()

    def test_merging_what_is_not_in_memory(self):
        packed, _ = adapted(CONFIGS["lora"])
        packed.base_model.model.linear.base_layer.to("meta")
        with pytest.raises(ValueError, match=r"not in memory.*remove_all_hooks"):
            packed.merge_adapter()

    def test_unmerging_twice_warns_as_peft_does(self):
        packed, _ = adapted(CONFIGS["lora"])
        with pytest.warns(UserWarning, match="Already unmerged"):
            packed.unmerge_adapter()


def test_the_memory_cost_is_logged_once(caplog):
    from diffusers_ternary.lora import packed_base

    packed_base._log_memory_once.cache_clear()
    packed, _ = adapted(CONFIGS["lora"])
    for _ in range(2):
        packed.merge_adapter()
        packed.unmerge_adapter()
    (line,) = [r.message for r in caplog.records if "Fused adapters" in r.message]
    assert "float32" in line
    assert "32 bits per weight" in line


class TestOtherMethods:
    """Methods of PEFT that are not made for packed layers: they run, or they are refused; none goes wrong quietly."""

    CONFIGS = {  # noqa: RUF012
        "ia3": IA3Config(target_modules=TARGETS, feedforward_modules=[]),
        "ia3 of inputs": IA3Config(target_modules=TARGETS, feedforward_modules=TARGETS),
        "oft": OFTConfig(r=2, oft_block_size=0, target_modules=[LINEAR, POINTWISE]),
        "boft": BOFTConfig(boft_block_size=2, target_modules=[LINEAR, POINTWISE]),
        "boft of a convolution": BOFTConfig(boft_block_size=9, target_modules=[CONV]),
        "vera": VeraConfig(r=2, target_modules=[LINEAR]),
        "miss": MissConfig(r=2, target_modules=[LINEAR]),
        "miss bat": MissConfig(r=4, init_weights="bat", target_modules=[LINEAR]),
        "miss mini": MissConfig(r=4, init_weights="mini", mini_r=4, target_modules=[LINEAR]),
        "shira": ShiraConfig(r=1, random_seed=0, target_modules=[LINEAR]),
    }

    @pytest.fixture(params=CONFIGS)
    def method(self, request):
        return self.CONFIGS[request.param]

    @staticmethod
    def wrap(model: nn.Module, config_of: object, seed: int = 0) -> PeftModel:
        torch.manual_seed(3)
        wrapped = get_peft_model(model, copy.deepcopy(config_of)).eval()
        generator = torch.Generator().manual_seed(seed)
        for _, parameter in sorted(wrapped.named_parameters()):
            if parameter.requires_grad:
                parameter.data = (torch.rand(parameter.shape, generator=generator) * 0.1).to(parameter.dtype)
        return wrapped

    @pytest.mark.parametrize("kind", ["ternary", "int8"])
    @torch.no_grad()
    def test_forward_and_merging(self, method, kind):
        plain = make(kind)[0](inputs())
        packed, dense = (self.wrap(model, method) for model in make(kind))
        before = packed(inputs())
        torch.testing.assert_close(before, dense(inputs()), **CLOSE)
        assert (before - plain).norm() > 0.001 * plain.norm()
        for wrapped in (packed, copy.deepcopy(packed)):
            for safe in (False, True):
                wrapped.merge_adapter(safe_merge=safe)
                torch.testing.assert_close(wrapped(inputs()), before, **CLOSE)
                wrapped.unmerge_adapter()  # exact, where PEFT divides or subtracts
                assert torch.equal(wrapped(inputs()), before)
            wrapped.merge_adapter()
            with wrapped.disable_adapter():
                assert torch.equal(wrapped(inputs()), plain)
        merged = packed.merge_and_unload()
        torch.testing.assert_close(merged(inputs()), before, **CLOSE)
        targets = set(method.target_modules)
        assert targets.isdisjoint(n for n, m in merged.named_modules() if isinstance(m, QuantizedLayer))

    @torch.no_grad()
    def test_two_adapters_and_one_below(self, method):
        packed, dense = (self.wrap(model, method) for model in make())
        for wrapped in (packed, dense):
            wrapped.merge_adapter()
        packed, dense = packed.unload(), dense.unload()
        first = packed(inputs())
        packed, dense = (self.wrap(model, method, seed=1) for model in (packed, dense))
        torch.testing.assert_close(packed(inputs()), dense(inputs()), **CLOSE)
        packed.merge_adapter()
        torch.testing.assert_close(packed(inputs()), dense(inputs()), **CLOSE)
        packed.unmerge_adapter()
        assert torch.equal(packed.unload()(inputs()), first)

    def test_gradients_are_those_on_the_dequantized_base(self, method):
        packed, dense = (self.wrap(model, method) for model in make())
        gradients = []
        for wrapped in (packed, dense):
            wrapped.train()
            wrapped(inputs()).square().sum().backward()
            gradients.append({name: p.grad for name, p in wrapped.named_parameters() if p.requires_grad})
        assert gradients[0].keys() == gradients[1].keys() != set()
        for name, gradient in gradients[1].items():
            torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-3, atol=1e-3)

    @torch.no_grad()
    def test_the_dtype_of_new_adapters_is_that_of_the_model(self, method):
        wrapped = []
        for model in make(dtype=torch.bfloat16):
            torch.manual_seed(3)
            wrapped.append(get_peft_model(model, copy.deepcopy(method), autocast_adapter_dtype=False).eval())
        packed, dense = (
            {name: parameter.dtype for name, parameter in model.named_parameters() if parameter.requires_grad}
            for model in wrapped
        )
        assert packed == dense
        x = inputs(torch.bfloat16)
        assert wrapped[0](x).dtype == wrapped[1](x).dtype == torch.bfloat16

    @torch.no_grad()
    def test_oft_of_a_convolution(self):
        """PEFT merges it wrongly, on floats too: not into packed layers."""
        oft = OFTConfig(r=2, oft_block_size=0, target_modules=[CONV])
        packed, dense = (self.wrap(model, oft) for model in make())
        before = dense(inputs())
        torch.testing.assert_close(packed(inputs()), before, **CLOSE)
        with pytest.raises(ValueError, match="PEFT merges OFT into k x k convolutions as another map"):
            packed.merge_adapter()
        dense.merge_adapter()
        assert (dense(inputs()) - before).norm() > 0.1 * before.norm(), "PEFT merges it right now: do so too"

    def test_masks_that_look_at_the_weight(self):
        """SHiRA's masks may be chosen by the values of the weight: they see those of the packed one."""

        def largest(base_layer: nn.Module, r: int, **kwargs: object) -> torch.Tensor:
            weight = base_layer.weight.abs()
            count = r * sum(weight.shape)
            mask = torch.zeros_like(weight).flatten()
            mask[weight.flatten().topk(count).indices.sort().values] = 1
            return mask.view_as(weight)

        masks = []
        for model in make():
            config_of = ShiraConfig(r=1, mask_type="largest", target_modules=[LINEAR])
            config_of.mask_fn = largest
            wrapped = get_peft_model(model, config_of)
            masks.append(wrapped.base_model.model.linear.shira_indices["default"])
        assert torch.equal(*masks)

    @pytest.mark.parametrize("kind", ["ternary", "int8"])
    def test_methods_that_read_the_base_weight_are_refused(self, kind):
        packed, dense = make(kind)
        with pytest.raises(ValueError, match=r"HRA reads or changes the base weight.*LORA.*dequantize\(\)"):
            get_peft_model(packed, HRAConfig(r=2, target_modules=[LINEAR]))
        assert isinstance(packed.linear, QuantizedLayer)
        get_peft_model(dense, HRAConfig(r=2, target_modules=[LINEAR]))

    def test_a_layer_that_nobody_knows_does_not_merge(self):
        from diffusers_ternary.lora.other_methods import adopt

        class Unknown(type(self.wrap(make()[1], self.CONFIGS["vera"]).base_model.model.linear)):
            pass

        packed = self.wrap(make()[0], self.CONFIGS["vera"])
        layer = packed.base_model.model.linear
        layer.__class__ = Unknown
        adopt(layer)
        with pytest.raises(ValueError, match=r"would change the packed weight.*unmerged, or call dequantize"):
            packed.merge_adapter()

    @torch.no_grad()
    def test_dequantizing_under_an_adapter(self, method):
        packed, dense = (self.wrap(model, method) for model in make())
        for name, module in list(packed.base_model.model.named_modules()):
            if isinstance(module, QuantizedLayer):
                packed.base_model.model.set_submodule(name, module.to_float())
        packed.merge_adapter()
        torch.testing.assert_close(packed(inputs()), dense(inputs()), **CLOSE)


@pytest.mark.parametrize("wrapped_by", ["get_peft_model", "add_adapter"])
def test_the_magnitudes_of_dora_have_the_dtype_of_the_model(wrapped_by):
    lora = LoraConfig(r=2, use_dora=True, target_modules=TARGETS)
    found = []
    for model in make(dtype=torch.bfloat16):
        wrapped = get_peft_model(model, copy.deepcopy(lora), autocast_adapter_dtype=wrapped_by == "get_peft_model")
        found.append({name: p.dtype for name, p in wrapped.named_parameters() if p.requires_grad})
        if wrapped_by == "add_adapter":  # as diffusers and transformers do: no autocast
            assert wrapped(inputs(torch.bfloat16)).dtype == torch.bfloat16
    assert found[0] == found[1]


def test_parameters_are_counted_as_weights():
    packed, dense = (get_peft_model(model, copy.deepcopy(CONFIGS["lora"])) for model in make())
    assert packed.get_nb_trainable_parameters() == dense.get_nb_trainable_parameters()
    mixed = [get_peft_model(model, copy.deepcopy(CONFIGS["loha"]), mixed=True) for model in make("int8")]
    assert mixed[0].get_nb_trainable_parameters() == mixed[1].get_nb_trainable_parameters()


class TestInPlace:
    """Without gradients, plain LoRA is added to the packed product in place."""

    @staticmethod
    def layer(**options: object) -> TernaryLoraLinear:
        options = {"r": 4, "lora_alpha": 6, "target_modules": [LINEAR], **options}
        return adapted(LoraConfig(**options))[0].base_model.model.linear

    @pytest.mark.parametrize("shape", [(36,), (5, 36), (2, 3, 36), (0, 36)], ids=str)
    @pytest.mark.parametrize("scaling", [0.0, 0.7, torch.tensor(0.7)], ids=str)
    def test_gives_what_peft_gives(self, shape, scaling):
        layer = self.layer()
        layer.scaling["default"] = scaling
        x = torch.randn(shape, generator=torch.Generator().manual_seed(5))
        kept = x.clone()
        expected = layer(x)  # with gradients: PEFT's own forward
        with torch.no_grad():
            assert layer._can_add_in_place(["default"], x)
            actual = layer(x)
        assert actual.shape == expected.shape
        torch.testing.assert_close(actual, expected, **CLOSE)
        assert torch.equal(x, kept)

    def test_inputs_that_are_not_contiguous(self):
        layer, x = self.layer(), torch.randn(36, 3, 2).permute(2, 1, 0)
        expected = layer(x)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), expected, **CLOSE)

    @pytest.mark.parametrize(
        "needs_more",
        [
            lambda layer: layer.lora_B["default"].register_forward_hook(lambda *_: None),
            lambda layer: layer.base_layer.register_forward_hook(lambda *_: None),
            lambda layer: setattr(layer.lora_B["default"], "forward", layer.lora_B["default"].forward),
            lambda layer: layer.lora_dropout.update({"default": nn.Dropout(0.5)}),
            lambda layer: (layer.lora_A.to(torch.bfloat16), layer.lora_B.to(torch.bfloat16)),
        ],
        ids=["hook on B", "hook on the base", "offloaded B", "dropout", "another dtype"],
    )
    @torch.no_grad()
    def test_not_where_more_is_to_be_done(self, needs_more):
        layer = self.layer()
        needs_more(layer)
        assert not layer._can_add_in_place(["default"], inputs())
        layer(inputs())

    @torch.no_grad()
    def test_what_a_hook_kept_is_not_changed(self):
        layer, kept = self.layer(), []
        layer.base_layer.register_forward_hook(lambda module, args, output: kept.append(output))
        layer(inputs())
        assert torch.equal(kept[0], layer.base_layer(inputs()))


@pytest.mark.parametrize(
    "lora",
    [CONFIGS["lora"], LoraConfig(r=4, use_dora=True, target_modules=[LINEAR])],
    ids=["lora", "dora of the linear layer"],
)
@torch.no_grad()
def test_compiles_into_one_graph(lora):
    packed, _ = adapted(lora)
    expected = packed(inputs())
    compiled = torch.compile(packed.base_model.model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs()), expected, **CLOSE)


def test_fusing_wants_a_weight_of_the_right_shape():
    packed, _ = make()
    with pytest.raises(ValueError, match=r"must be float \[8, 36\], got torch.float32 \[36, 8\]"):
        packed.linear.fuse(torch.zeros(36, 8))
    with pytest.raises(ValueError, match=r"must be float \[8, 36\], got torch.int8"):
        packed.linear.fuse(torch.zeros(8, 36, dtype=torch.int8))


class TestModulesToSave:
    """What is trained as a whole is a float copy of the packed layers."""

    CONFIG = LoraConfig(r=2, target_modules=[LINEAR], modules_to_save=[POINTWISE], init_lora_weights=False)

    @pytest.mark.parametrize("kind", ["ternary", "int8"])
    def test_training_saving_loading(self, kind, tmp_path):
        wrapped = []
        for model in make(kind):
            torch.manual_seed(0)
            peft_model = get_peft_model(model, copy.deepcopy(self.CONFIG))
            optimizer = torch.optim.SGD([p for p in peft_model.parameters() if p.requires_grad], lr=0.1)
            peft_model(inputs()).square().mean().backward()
            optimizer.step()
            wrapped.append(peft_model.eval())
        packed, dense = wrapped
        pointwise = packed.base_model.model.pointwise
        assert isinstance(pointwise.original_module, QuantizedLayer)
        assert type(pointwise.modules_to_save["default"]) is nn.Conv2d
        names = [{n for n, p in model.named_parameters() if p.requires_grad} for model in wrapped]
        assert names[0] == names[1]
        expected = packed(inputs())
        torch.testing.assert_close(expected, dense(inputs()), **CLOSE)
        with torch.no_grad(), packed.disable_adapter(), dense.disable_adapter():
            torch.testing.assert_close(packed(inputs()), dense(inputs()), **CLOSE)
        packed.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(make(kind)[0], tmp_path)
        assert torch.equal(again(inputs()), expected)
        merged = packed.merge_and_unload()
        torch.testing.assert_close(merged(inputs()), expected, **CLOSE)
        assert type(merged.pointwise) is nn.Conv2d

    def test_a_module_with_packed_layers_inside(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 12), nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 6)))
        quantize(model, config())
        expected = model(torch.ones(1, 12))
        wrapped = get_peft_model(model, LoraConfig(target_modules=["0"], modules_to_save=["1"]))
        copied = wrapped.base_model.model[1].modules_to_save["default"]
        assert [type(layer) for layer in copied] == [nn.Linear, nn.ReLU, nn.Linear]
        assert all(parameter.requires_grad for parameter in copied.parameters())
        torch.testing.assert_close(wrapped(torch.ones(1, 12)), expected, **CLOSE)
