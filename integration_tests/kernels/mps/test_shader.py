# SPDX-License-Identifier: Apache-2.0
"""Apple GPUs without one: the body of the Metal kernel compiled as C, bit for bit against the reference, and the path
around it with that body in place of the shader. The blocked path, which serves devices without a kernel, likewise.
"""

import ctypes
import functools
import logging
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusers_ternary.kernels import blocked, mps, reference
from diffusers_ternary.kernels.mps.shader import BODY, definitions, metal_source
from diffusers_ternary.kernels.triton.trial import Trials
from diffusers_ternary.ternarize import TernaryWeight, rotate, ternarize
from integration_tests.support.operands import of_parts, of_weight_parts


C_TYPES = {torch.float32: "float", torch.float16: "_Float16"}
needs_compiler = pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler")


@functools.cache
def compiled_body(dtype: torch.dtype, scale_dtype: torch.dtype, double: bool) -> ctypes.CDLL:
    """The body for every packed byte of a matrix, as a C function."""
    head = "#define device\n" + definitions(C_TYPES[dtype], C_TYPES[scale_dtype], double)
    loop = """
void unpack(OUT* out, const signed char* weight, const SCALE* scale, const unsigned char* multiplier,
            int columns, int width, int group_size, int groups, long threads) {
    for (long i = 0; i < threads; ++i)
        unpack_byte(out, weight, scale, multiplier, columns, width, group_size, groups, i / width, i % width);
}
"""
    folder = Path(tempfile.mkdtemp())
    (folder / "body.c").write_text(head + BODY + loop, encoding="utf-8")
    # Each product is rounded, as the reference does it.
    command = ["gcc", "-std=c11", "-O1", "-Wall", "-Werror", "-ffp-contract=off", "-shared", "-fPIC", "-o"]
    subprocess.run([*command, str(folder / "body.so"), str(folder / "body.c")], check=True)
    library = ctypes.CDLL(str(folder / "body.so"))
    shutil.rmtree(folder)
    return library


class Shader:
    """What `torch.mps.compile_shader` returns, on the CPU."""

    def __init__(self, dtype: torch.dtype, scale_dtype: torch.dtype, double: bool) -> None:
        self.library = compiled_body(dtype, scale_dtype, double)

    def unpack(self, *arguments, threads: int, arg_casts: dict[int, str]) -> None:
        assert all(tensor.is_contiguous() for tensor in arguments[:4])
        assert arg_casts == {position: "int32" for position, a in enumerate(arguments) if isinstance(a, int)}
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in arguments[:4]]
        self.library.unpack(*pointers, *map(ctypes.c_int, arguments[4:]), ctypes.c_long(threads))


@pytest.fixture
def shaders(monkeypatch) -> list[tuple[object, ...]]:
    """Puts the C body in place of the shader; lists the kinds that were compiled."""
    kinds: list[tuple[object, ...]] = []

    def shader(*kind):
        if kind not in kinds:
            kinds.append(kind)
        return Shader(*kind)

    monkeypatch.setattr(mps, "_shader", shader)
    monkeypatch.setattr(mps, "_trials", Trials("mps"))
    mps._buffer_of.cache_clear()
    return kinds


def weight_of(n: int, k: int, layout: str, group_size: int | None) -> TernaryWeight:
    dense = torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)) * torch.linspace(0.01, 1, k)
    return ternarize(dense, group_size=group_size, scales=layout)


LAYOUTS = [("double", 16), ("group", 20), ("group", None), ("double", 7)]


@needs_compiler
@pytest.mark.parametrize("dtype", list(C_TYPES))
@pytest.mark.parametrize(("layout", "group_size"), LAYOUTS)
@pytest.mark.parametrize("k", [1, 5, 64, 203])
def test_the_body_is_the_reference_bit_for_bit(shaders, dtype, layout, group_size, k):
    w = weight_of(19, k, layout, group_size)
    for scale in (w.scale.half(), w.scale.float()):
        options = {"in_features": k, "group_size": w.spec.group_size, "dtype": dtype}
        expected = of_weight_parts(reference.dequantize)(w.packed, scale, w.multiplier, **options)
        assert torch.equal(of_weight_parts(mps.dequantize)(w.packed, scale, w.multiplier, **options), expected)


def test_the_shader_defines_what_its_body_needs():
    source = metal_source(torch.bfloat16, torch.float16, True)
    assert BODY in source
    for text in ("#define OUT bfloat\n", "#define SCALE half\n", "#define DOUBLE 1\n", "kernel void unpack("):
        assert text in source


@needs_compiler
@pytest.mark.parametrize("hadamard", [0, 16])
@pytest.mark.parametrize(("layout", "group_size"), LAYOUTS)
def test_products_in_blocks_of_one_buffer(monkeypatch, shaders, layout, group_size, hadamard):
    monkeypatch.setattr(mps, "BUFFER_ELEMENTS", 20 * 64)  # 20 rows of 48 at a time
    w = weight_of(48, 64, layout, group_size)
    x, bias = torch.randn(2, 3, 64), torch.randn(48)
    options = {"in_features": 64, "group_size": w.spec.group_size, "hadamard": hadamard}
    y = of_parts(mps.linear)(x, w.packed, w.scale, w.multiplier, bias, **options)
    dense = of_weight_parts(reference.dequantize)(
        w.packed, w.scale, w.multiplier, in_features=64, group_size=w.spec.group_size, dtype=torch.float32
    )
    torch.testing.assert_close(y, F.linear(rotate(x, hadamard), dense, bias))
    (held,) = mps._buffer_of(x.device, x.dtype)
    assert held.numel() == 20 * 64
    of_parts(mps.linear)(x, w.packed, w.scale, w.multiplier, None, **options)
    assert mps._buffer_of(x.device, x.dtype)[0] is held
    assert shaders == [(torch.float32, torch.float16, layout == "double")]


@pytest.mark.parametrize("fault", ["does not compile", "is wrong"])
def test_a_kernel_that_fails_is_named_once_and_left_out(monkeypatch, caplog, fault):
    def shader(*_):
        if fault == "does not compile":
            raise SyntaxError("program_source:3: error: unknown type name 'bfloat'")
        return SimpleNamespace(unpack=lambda out, *_, **__: out.fill_(1))

    monkeypatch.setattr(mps, "_shader", shader)
    monkeypatch.setattr(mps, "_trials", Trials("mps"))
    w, x = weight_of(48, 64, "double", 16), torch.randn(3, 64)
    options = {"in_features": 64, "group_size": 16}
    expected = of_parts(reference.linear)(x, w.packed, w.scale, w.multiplier, None, **options)
    with caplog.at_level(logging.WARNING, "diffusers_ternary"):
        for _ in range(2):
            torch.testing.assert_close(
                of_parts(mps.linear)(x, w.packed, w.scale, w.multiplier, None, **options), expected
            )
    (record,) = caplog.records
    assert "The Metal kernel (torch.float32, multipliers) does not work on mps and is left out" in record.message


@pytest.mark.parametrize("activation_dtype", ["none", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("hadamard", [0, 16])
def test_the_blocked_path_is_the_reference(monkeypatch, activation_dtype, hadamard):
    monkeypatch.setattr(blocked, "BLOCK_ELEMENTS", 20 * 64)
    w = weight_of(50, 64, "double", 16)
    x, bias = torch.randn(2, 3, 64), torch.randn(50)
    options = {"in_features": 64, "group_size": 16, "activation_dtype": activation_dtype, "hadamard": hadamard}
    y = of_parts(blocked.linear)(x, w.packed, w.scale, w.multiplier, bias, **options)
    torch.testing.assert_close(y, of_parts(reference.linear)(x, w.packed, w.scale, w.multiplier, bias, **options))


class LargestTensor(TorchDispatchMode):
    """The most bytes of any tensor that an operator returns, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


def test_scratch_of_the_blocked_path_is_bounded():
    """A layer of 3072 x 12288, on a device without memory: beside operands and result nothing grows with it."""
    n, k, group_size, rows = 12288, 3072, 128, 512
    empty = functools.partial(torch.empty, device="meta")
    weight, scale = empty(n, k // 4, dtype=torch.int8), empty(n, 1, dtype=torch.float16)
    multiplier, x = empty(n, k // group_size, dtype=torch.uint8), empty(rows, k, dtype=torch.bfloat16)
    result_bytes, operand_bytes = rows * n * 2, n * k // 4
    with LargestTensor() as largest:
        y = of_parts(blocked.linear)(x, weight, scale, multiplier, None, in_features=k, group_size=group_size)
    assert y.shape == (rows, n)
    assert largest.bytes <= max(result_bytes, operand_bytes, blocked.BLOCK_ELEMENTS * 4)
    with LargestTensor() as whole:
        of_parts(reference.linear)(x, weight, scale, multiplier, None, in_features=k, group_size=group_size)
    assert whole.bytes == n * k * 4
