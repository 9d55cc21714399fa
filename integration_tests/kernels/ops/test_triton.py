# SPDX-License-Identifier: Apache-2.0
"""The operators as GPUs see them, without a GPU: registration, fallback, names, tracing, capture.

Device "cuda" is a fake one where only shapes matter; where kernels run, Triton's interpreter runs them on the CPU.
"""

import logging
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode

from diffusers_ternary.kernels import reference
from diffusers_ternary.kernels import triton as kernels
from diffusers_ternary.kernels.ops import kernel_name, serving, ternary_linear, ternary_rotate, ternary_unpack
from diffusers_ternary.kernels.ops import triton as registered
from diffusers_ternary.layers import TernaryLinear
from diffusers_ternary.ternarize import TernaryWeight, rotate, ternarize
from integration_tests.support.fresh_process import run_python
from integration_tests.support.interpreter import skip_without_interpreter
from integration_tests.support.operands import of_parts, of_weight_parts


@pytest.fixture(autouse=True)
def _forget_devices():
    """The answers for devices are cached; tests ask about devices that are not what they seem."""
    serving._triton_serves.cache_clear()
    kernels.unavailable_reason.cache_clear()
    yield
    serving._triton_serves.cache_clear()
    kernels.unavailable_reason.cache_clear()


def weight_of(hadamard: int = 0) -> TernaryWeight:
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(0))
    return ternarize(weight, group_size=64, scales="double", hadamard=hadamard)


def arguments(x: torch.Tensor, w: TernaryWeight, activation_dtype: str = "none"):
    spec = w.spec
    tensors = (x, w.packed, w.scale, w.multiplier, None)
    return (*tensors, spec.in_features, spec.group_size, activation_dtype, spec.hadamard)


def has_kernel(operator: torch.library.CustomOpDef, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator._qualname, key)


@pytest.mark.parametrize("operator", [ternary_linear, ternary_unpack, ternary_rotate], ids=lambda op: op._name)
def test_gpus_have_kernels_of_their_own(operator):
    assert has_kernel(operator, "CUDA")
    assert has_kernel(operator, "XPU")
    assert has_kernel(operator, "MPS") == (operator is not ternary_rotate)  # torch rotates there
    assert has_kernel(operator, "CompositeExplicitAutograd") or has_kernel(operator, "CompositeImplicitAutograd")


def test_the_reference_serves_without_triton_and_one_line_says_so(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "triton", None)
    x, w = torch.randn(3, 256), weight_of(hadamard=64)
    with caplog.at_level(logging.WARNING, "diffusers_ternary"):
        y = [registered._linear(*arguments(x, w)) for _ in range(3)][-1]
        dense = registered._unpack(w.packed, w.scale, w.multiplier, 256, 64, torch.float16)
        rotated = registered._rotate(x, 64)
    assert [record.message for record in caplog.records] == [
        "Ternary layers on cpu:0 use the torch reference: triton is not installed."
    ]
    expected = (
        rotate(x, 64)
        @ of_weight_parts(reference.dequantize)(
            w.packed, w.scale, w.multiplier, in_features=256, group_size=64, dtype=torch.float32
        ).T
    )
    torch.testing.assert_close(y, expected)
    assert dense.dtype == torch.float16
    assert torch.equal(rotated, rotate(x, 64))


@pytest.mark.parametrize(
    ("broken", "reason"),
    [("target_of", "Triton does not start (RuntimeError: no driver)"), ("current", "a first kernel failed")],
)
def test_a_triton_that_does_not_work_is_told_apart(monkeypatch, broken, reason):
    devices = pytest.importorskip("diffusers_ternary.kernels.triton.devices")

    def fail(*_: object) -> None:
        raise RuntimeError("no driver")

    monkeypatch.setattr(devices, "target_of", lambda *_: devices.Target("cuda", 80, 1 << 16))
    monkeypatch.setattr(devices, broken, fail)
    assert reason in str(kernels.unavailable_reason("cuda"))


@pytest.mark.parametrize("device", ["cuda", "xpu", "mps", "meta", "cuda:3"])
def test_names_of_devices_that_are_not_here(device):
    if not torch.cuda.is_available():
        assert kernel_name(device, "auto") == "torch"


@pytest.mark.parametrize(
    ("activation_dtype", "arch", "name"),
    [
        ("auto", 90, "triton float8_e4m3fn"),
        ("auto", 80, "triton int8"),
        ("none", 90, "triton"),
        ("float8_e4m3fn", 80, "triton"),  # which has no float8: the exact product serves
    ],
)
def test_names_say_what_serves(monkeypatch, activation_dtype, arch, name):
    devices = pytest.importorskip("diffusers_ternary.kernels.triton.devices")
    monkeypatch.setattr(devices, "target_of", lambda *_: devices.Target("cuda", arch, 160 * 1024))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(serving, "triton_serves", lambda _: True)
    assert kernel_name("cuda", activation_dtype) == name


def fake_layer(mode: FakeTensorMode, hadamard: int = 0) -> TernaryLinear:
    layer = TernaryLinear.from_weight(weight_of(hadamard), torch.randn(48), activation_dtype="auto")
    for name, parameter in list(layer.named_parameters()):
        with mode:
            fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cuda")
        setattr(layer, name, torch.nn.Parameter(fake, requires_grad=False))
    return layer


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("hadamard", [0, 64])
def test_traces_into_one_graph_on_cuda(strict, hadamard):
    """`strict` traces with the compiler's front end, as `torch.compile(fullgraph=True)` does."""
    mode = FakeTensorMode()
    layer = fake_layer(mode, hadamard)
    with mode:
        x = torch.empty(2, 8, 256, device="cuda", dtype=torch.bfloat16)
    program = torch.export.export(layer, (x,), strict=strict)
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert calls == ["aten.view.dtype", "diffusers_ternary.linear.default"]
    (output,) = (node for node in program.graph.nodes if "linear" in str(node.target))
    value = output.meta["val"]
    assert (tuple(value.shape), value.dtype, value.device.type) == ((2, 8, 48), torch.bfloat16, "cuda")


@pytest.mark.parametrize("hadamard", [0, 64])
def test_gradients_need_operators_only(hadamard):
    """The backward pass calls operators that have fake kernels, so the compiler can trace it for any device."""
    w = weight_of(hadamard)
    x = torch.empty(5, 256, device="meta", dtype=torch.bfloat16, requires_grad=True)
    meta = TernaryWeight(w.spec, w.packed.to("meta"), w.scale.to("meta"), w.multiplier.to("meta"))
    ternary_linear(*arguments(x, meta)).sum().backward()
    assert (x.grad.shape, x.grad.dtype, x.grad.device.type) == ((5, 256), torch.bfloat16, "meta")


@pytest.mark.parametrize("hadamard", [0, 64])
def test_operators_pass_opcheck(hadamard):
    w = weight_of(hadamard)
    torch.library.opcheck(ternary_unpack, (w.packed, w.scale, w.multiplier, 256, 64, torch.float16))
    torch.library.opcheck(ternary_rotate, (torch.randn(2, 3, 70), 32))
    torch.library.opcheck(ternary_linear, arguments(torch.randn(3, 256, requires_grad=True), w))


def test_the_gradient_is_rotated_back():
    w = weight_of(hadamard=64)
    x = torch.randn(5, 256, requires_grad=True)
    grad = torch.randn(5, 48)
    ternary_linear(*arguments(x, w)).backward(grad)
    torch.testing.assert_close(x.grad, grad @ w.dequantize(), rtol=1e-4, atol=1e-4)


def test_nothing_is_measured_while_a_graph_is_captured(monkeypatch, tmp_path):
    """And the host code reads no value of a tensor: on fake tensors that would raise."""
    pytest.importorskip("triton")
    from diffusers_ternary.kernels.triton import product, tuning
    from integration_tests.support.gpu_compiler import TARGETS, launches_on

    def measure(_: object) -> float:
        raise AssertionError("measured while capturing")

    tuner = tuning.Tuner(TARGETS["sm_90"], tuning.PlanCache(tmp_path / "plans.json"), measure)
    monkeypatch.setattr(product, "supported_target", lambda _: TARGETS["sm_90"])
    monkeypatch.setattr(product, "current", lambda _: torch.no_grad())
    monkeypatch.setattr(product, "tuner_of", lambda *_: tuner)
    monkeypatch.setattr(product, "is_capturing", lambda _: True)
    with launches_on("sm_90", compiles=False) as launches:
        packed = torch.empty(48, 64, dtype=torch.int8, device="cuda")
        scale = torch.empty(48, 1, dtype=torch.float16, device="cuda")
        multiplier = torch.empty(48, 4, dtype=torch.uint8, device="cuda")
        for rows in (1, 300, 5000):
            x = torch.empty(rows, 256, dtype=torch.bfloat16, device="cuda")
            options = {"in_features": 256, "group_size": 64, "activation_dtype": "int8", "hadamard": 64}
            y = of_parts(kernels.linear)(x, packed, scale, multiplier, None, **options)
            assert y.shape == (rows, 48)
    assert [launched.name for launched in launches] == [
        *("quantize_kernel", "gemv_kernel"),
        *("quantize_kernel", "fused_kernel"),
        *("quantize_kernel", "unpack_kernel", "dense_kernel"),
    ]
    assert not (tmp_path / "plans.json").exists()


def test_the_operators_run_triton_end_to_end():
    """Under the interpreter, in a process of its own: what is registered for GPUs, called on the CPU."""
    skip_without_interpreter()
    outcome = run_python(
        """
        import json, logging, torch
        from diffusers_ternary.kernels.ops import triton as registered
        from diffusers_ternary.kernels import reference
        from integration_tests.support.operands import of_weight_parts
        from diffusers_ternary.ternarize import ternarize
        errors = {}
        torch.manual_seed(0)
        for hadamard in (0, 64):
            w = ternarize(torch.randn(48, 256), group_size=64, scales="double", hadamard=hadamard)
            x = torch.randn(2, 9, 256, dtype=torch.float16)
            dense = w.dequantize()
            for activation_dtype in ("none", "int8", "auto"):
                y = registered._linear(
                    x, w.packed, w.scale, w.multiplier, None, 256, 64, activation_dtype, hadamard
                )
                expected = x.float() @ dense.T
                errors[f"{hadamard} {activation_dtype}"] = float((y - expected).norm() / expected.norm())
            exact = of_weight_parts(reference.dequantize)(
                w.packed, w.scale, w.multiplier, in_features=256, group_size=64, dtype=torch.float16
            )
            assert torch.equal(registered._unpack(w.packed, w.scale, w.multiplier, 256, 64, torch.float16), exact)
        print(json.dumps(errors))
        """,
        TRITON_INTERPRET="1",
    )
    assert max(outcome.values()) < 0.015
