# SPDX-License-Identifier: Apache-2.0
"""The operator on a GPU: dtypes, rotation, compile, graphs, export, streams, gradients, memory."""

import pytest
import torch
import torch.nn.functional as F

from diffusers_ternary.kernels import reference
from diffusers_ternary.kernels.ops import ternary_linear, ternary_rotate, ternary_unpack
from diffusers_ternary.layers import TernaryLinear
from diffusers_ternary.ternarize import TernaryWeight, rotate, ternarize
from integration_tests.support.operands import of_weight_parts


GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BACKEND = "inductor" if GPU else "aot_eager"  # without a GPU only the tracing is of interest
# Relative RMS error against float32 activations: the bounds of `dispatch.ACTIVATION_ERROR`, and bfloat16's rounding.
TOLERANCE = {"none": 0.01, "int8": 0.02, "float8_e4m3fn": 0.05, "auto": 0.05}
SHAPES = [
    (1, 18432, 3072),
    (16, 512, 2240),
    (77, 1152, 1152),
    (512, 3072, 3072),
    (4096, 1024, 2240),
    (4608, 3072, 3072),
]
SHAPES = SHAPES if GPU else [(1, 96, 512), (19, 40, 650)]


def make(n: int, k: int, scales: str = "double", hadamard: int = 0) -> TernaryWeight:
    return ternarize(torch.randn(n, k, device=DEVICE) * 0.02, group_size=128, scales=scales, hadamard=hadamard)


def layer(n: int, k: int, activation_dtype: str = "auto", hadamard: int = 0) -> TernaryLinear:
    bias = torch.randn(n, device=DEVICE, dtype=torch.bfloat16)
    return TernaryLinear.from_weight(make(n, k, hadamard=hadamard), bias, activation_dtype=activation_dtype)


def call(x: torch.Tensor, w: TernaryWeight, bias: torch.Tensor | None, activation_dtype: str) -> torch.Tensor:
    spec = w.spec
    tensors = (x, w.packed, w.scale, w.multiplier, bias)
    return ternary_linear(*tensors, spec.in_features, spec.group_size, activation_dtype, spec.hadamard)


def relative_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("activation_dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scales", ["double", "group"])
def test_operator_against_float32(shape, activation_dtype, dtype, scales):
    m, n, k = shape
    w = make(n, k, scales)
    x, bias = torch.randn(m, k, device=DEVICE, dtype=dtype), torch.randn(n, device=DEVICE, dtype=dtype)
    y = call(x, w, bias, activation_dtype)
    expected = F.linear(x.float(), w.dequantize(torch.float32), bias.float())
    assert torch.isfinite(y).all()
    assert relative_rms(y, expected) < TOLERANCE[activation_dtype]


@pytest.mark.parametrize("activation_dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("hadamard", [32, 128])
def test_rotated_operator(shape, activation_dtype, hadamard):
    m, n, k = shape
    w = make(n, k, hadamard=hadamard)
    x = torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16)
    expected = F.linear(x.float(), w.dequantize(torch.float32))
    assert relative_rms(call(x, w, None, activation_dtype), expected) < TOLERANCE[activation_dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("shape", "block"), [((5, 256), 128), ((2, 3, 700), 256), ((1, 15360), 128)])
def test_rotation(shape, block, dtype):
    x = torch.randn(*shape, device=DEVICE, dtype=dtype)
    expected = rotate(x.cpu().double(), block).to(dtype)
    torch.testing.assert_close(ternary_rotate(x, block).cpu(), expected, rtol=8e-3, atol=1e-5)


def test_names_say_what_serves():
    model = layer(64, 128)
    assert model.kernel.startswith("triton") == GPU
    assert f"kernel={model.kernel}" in repr(model)


@pytest.mark.parametrize("m", [3, 300])
def test_float32_is_exact(m):
    w, x = make(256, 1000), torch.randn(m, 1000, device=DEVICE)
    expected = F.linear(x, w.dequantize(torch.float32))
    torch.testing.assert_close(call(x, w, None, "none"), expected, rtol=1e-4, atol=1e-4)


def test_token_order_does_not_matter():
    w, x = make(3072, 3072), torch.randn(1024 if GPU else 24, 3072, device=DEVICE, dtype=torch.bfloat16)
    assert torch.equal(call(x, w, None, "auto").flip(0), call(x.flip(0), w, None, "auto"))


@pytest.mark.parametrize("hadamard", [0, 128])
@pytest.mark.parametrize("m", [1, 1024 if GPU else 24])
def test_compile_fullgraph_equals_eager(m, hadamard):
    model = layer(1024, 1024, hadamard=hadamard)
    x = torch.randn(m, 1024, device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(torch.compile(model, fullgraph=True, backend=BACKEND)(x), model(x))


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("m", [1, 1024])
def test_cuda_graphs_of_the_compiler(m):
    model = layer(1024, 1024)
    x = torch.randn(m, 1024, device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model(x)
        graphed = torch.compile(model, fullgraph=True, mode="reduce-overhead")
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            actual = graphed(x).clone()
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("hadamard", [0, 128])
def test_compiled_backward_equals_eager(hadamard):
    model = layer(256, 512, hadamard=hadamard)
    compiled = torch.compile(model, fullgraph=True, backend=BACKEND)
    gradients = []
    for function in (model, compiled):
        x = torch.ones(64, 512, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        function(x).float().square().mean().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0.02, atol=1e-5)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("tuned", [True, False])
def test_cuda_graph_replays_on_new_inputs(tuned):
    model = layer(640 if tuned else 656, 1024)  # a shape of its own: untuned, capture takes the default plan
    x = torch.randn(1024, 1024, device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        if tuned:
            model(x)
        else:
            # Compiles the default plans without a call that could tune this shape.
            layer(672, 1024)(x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            y = model(x)
        x.copy_(torch.randn_like(x))
        y.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        dense = model.dequantize(torch.float32)
    assert relative_rms(y, F.linear(x.float(), dense, model.bias.float())) < 0.05


def test_export():
    model = layer(256, 512)
    x = torch.randn(64, 512, device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        assert torch.equal(program.module()(x), model(x))


@pytest.mark.usefixtures("cuda")
def test_no_synchronization_once_tuned():
    model = layer(1024, 1024)
    x = torch.randn(1024, 1024, device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        model(x)
        torch.cuda.synchronize()
        previous = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(x)
        finally:
            torch.cuda.set_sync_debug_mode(previous)


@pytest.mark.usefixtures("cuda")
def test_streams_do_not_share_scratch():
    model = layer(2048, 2048)
    inputs = [torch.randn(2048, 2048, device=DEVICE, dtype=torch.bfloat16) for _ in range(4)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in inputs]
        for _ in range(5):
            actual = []
            for stream, x in zip(streams, inputs, strict=True):
                with torch.cuda.stream(stream):
                    actual.append(model(x))
            torch.cuda.synchronize()
            assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.usefixtures("cuda")
def test_weight_moved_on_another_stream():
    """What streamed offloading does: copy on a side stream, compute on the main one, free after `record_stream`."""
    packed = make(2048, 2048)
    x = torch.randn(512, 2048, device=DEVICE, dtype=torch.bfloat16)
    expected = call(x, packed, None, "auto")
    host = packed.packed.cpu().pin_memory()
    side = torch.cuda.Stream()
    for _ in range(10):
        with torch.cuda.stream(side):
            moved = host.to(DEVICE, non_blocking=True)
        torch.cuda.current_stream().wait_stream(side)
        moved.record_stream(torch.cuda.current_stream())
        w = TernaryWeight(packed.spec, moved, packed.scale, packed.multiplier)
        actual = call(x, w, None, "auto")
        del moved, w
        with torch.cuda.stream(side):
            torch.full((2048, 512), 0x55, dtype=torch.int8, device=DEVICE)  # takes the freed block, if it is free
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("hadamard", [0, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradient_of_the_input(dtype, hadamard):
    w = make(512, 768, hadamard=hadamard)
    x = torch.randn(128, 768, device=DEVICE, dtype=dtype, requires_grad=True)
    grad = torch.randn(128, 512, device=DEVICE, dtype=dtype)
    call(x, w, None, "auto").backward(grad)
    expected = grad.float() @ w.dequantize(torch.float32)
    assert relative_rms(x.grad, expected) < 0.01


def test_dequantize_equals_the_reference():
    n, k = (3072, 3072) if GPU else (64, 650)
    w = make(n, k)
    actual = ternary_unpack(w.packed, w.scale, w.multiplier, k, 128, torch.bfloat16)
    options = {"in_features": k, "group_size": 128, "dtype": torch.bfloat16}
    assert torch.equal(actual, of_weight_parts(reference.dequantize)(w.packed, w.scale, w.multiplier, **options))


@pytest.mark.usefixtures("cuda")
def test_scratch_is_one_layer_and_is_returned():
    model = layer(12288, 3072)
    x = torch.randn(4096, 3072, device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        model(x)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        y = model(x)
        torch.cuda.synchronize()
    output = y.numel() * y.element_size()
    scratch = torch.cuda.max_memory_allocated() - before - output
    dense = 12288 * 3072
    # The 8-bit weight, the 8-bit activations, and (int8 through the library) an int32 product.
    assert scratch <= dense + x.numel() + 2 * output + (1 << 20)
    del y
    assert torch.cuda.memory_allocated() == before


@pytest.mark.usefixtures("cuda")
def test_vram_is_returned():
    start = torch.cuda.memory_allocated()
    model = layer(8192, 8192)
    assert torch.cuda.memory_allocated() - start < 8192 * 8192 * 2 / 7.5
    model.to("cpu")
    del model
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= start + (1 << 20)


@pytest.mark.usefixtures("cuda")
def test_products_larger_than_two_gigabytes_are_addressed():
    m, n, k = 70_000, 32_768, 64  # M * N > 2**31
    w, x = make(n, k), torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16)
    y = call(x, w, None, "int8")
    expected = F.linear(x[-64:].float(), w.dequantize(torch.float32))
    assert relative_rms(y[-64:], expected) < 0.02
