# SPDX-License-Identifier: Apache-2.0
"""What is launched on GPUs, compiled for them without one: spills, matrix instruction, shared memory, loop length.

The interpreter accepts what GPUs reject. Here the host code itself runs, on fake tensors, with the plans that dispatch
trusts; every kernel it launches is specialized and compiled as on that GPU.
"""

import dataclasses
import re
from typing import Any

import pytest
import torch


triton: Any = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("compile checks need Triton without its interpreter", allow_module_level=True)

from diffusers_ternary.kernels.triton import launch, product  # noqa: E402
from diffusers_ternary.kernels.triton.dispatch import Plan, Request, candidates  # noqa: E402
from diffusers_ternary.kernels.triton.weights import PackedWeight  # noqa: E402
from integration_tests.support.gpu_compiler import TARGETS, Compiled, launches_on, matrix_loops  # noqa: E402


pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
OPERAND = {"none": r"bf16", "int8": r"s8", "float8_e4m3fn": r"e4m3"}


def matrix_instruction(name: str, activation_dtype: str) -> str:
    """The matrix instruction to expect of a large tile."""
    if name == "gfx942":
        return {"none": r"v_mfma_f32_\S*bf16", "int8": r"v_mfma_i32_\S*i8"}[activation_dtype]
    if name == "sm_90":
        return rf"wgmma\.mma_async\S*{OPERAND[activation_dtype]}"
    shape = "m16n8k16" if activation_dtype == "none" else "m16n8k32"
    return rf"mma\.sync\.aligned\.{shape}\S*{OPERAND[activation_dtype]}"


@dataclasses.dataclass(frozen=True)
class Case:
    """A product on a target: the first plan of a path that dispatch offers."""

    name: str
    path: str
    activation_dtype: str
    rows: int
    group_size: int | None = 128
    in_features: int = 3072
    hadamard: int = 0
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        scales = f"g{self.group_size}" if self.group_size else "row"
        rotated = f"-h{self.hadamard}" if self.hadamard else ""
        return f"{self.name}-{self.path}-{self.activation_dtype}-m{self.rows}-k{self.in_features}-{scales}{rotated}"


def fake_weight(case: Case, out_features: int = 3072) -> PackedWeight:
    def empty(columns: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(out_features, columns, dtype=dtype, device="cuda")

    size = case.group_size or case.in_features
    multiplier = empty(-(-case.in_features // size), torch.int8) if case.group_size else None
    packed, scale = empty(-(-case.in_features // 4), torch.int8), empty(1, torch.float16)
    return PackedWeight(packed, scale, multiplier, case.in_features, size, case.hadamard)


def plan_of(case: Case, tile: tuple[int, int, int] | None = None, *, exact: bool = False) -> Plan:
    """The first plan of the case's path, of a tile and of a precision."""
    size = case.group_size or case.in_features
    request = Request(
        case.rows, 3072, case.in_features, size, case.group_size is None, case.dtype, case.activation_dtype
    )
    offered = candidates(TARGETS[case.name], request, case.activation_dtype)
    return next(
        plan
        for plan in offered
        if plan.path == case.path
        and plan.exact == exact
        and tile in (None, (plan.block_m, plan.block_n, plan.block_k))
    )


def compile_product(
    case: Case,
    scale_sums: bool | None = None,
    tile: tuple[int, int, int] | None = None,
    *,
    exact: bool = False,
) -> dict[str, Compiled]:
    """Every kernel of a product, by name; `scale_sums` overrules the plan's."""
    target, plan = TARGETS[case.name], plan_of(case, tile, exact=exact)
    plan = plan if scale_sums is None else dataclasses.replace(plan, scale_sums=scale_sums)
    with launches_on(case.name) as launches:
        x = torch.empty(case.rows, case.in_features, dtype=case.dtype, device="cuda")
        bias = torch.empty(3072, dtype=case.dtype, device="cuda")
        y = product.run(plan, x, fake_weight(case), bias, case.activation_dtype, target)
        assert (y.shape, y.dtype) == ((case.rows, 3072), case.dtype)
    for launched in launches:
        assert launched.spills == 0, f"{launched.name} spills {launched.spills} bytes"
        assert launched.shared <= target.shared_memory, launched.name
    return {launched.name: launched for launched in launches}


FUSED = [
    Case("sm_80", "fused", "none", 1024),
    Case("sm_80", "fused", "int8", 1024, None),
    Case("sm_80", "fused", "int8", 40),
    Case("sm_86", "fused", "int8", 1024, hadamard=128),
    Case("sm_89", "fused", "float8_e4m3fn", 300),
    Case("sm_90", "fused", "none", 1024),
    Case("sm_90", "fused", "float8_e4m3fn", 1024, None),
    Case("sm_90", "fused", "float8_e4m3fn", 512),
    Case("sm_90", "fused", "int8", 1024),
    Case("sm_120", "fused", "int8", 1024),
    Case("gfx942", "fused", "none", 1024, None),
    Case("gfx942", "fused", "int8", 1024),
]


@pytest.mark.parametrize("case", FUSED, ids=str)
def test_fused(case):
    name = "sm_80" if case.name.startswith("sm_8") or case.name == "sm_120" else case.name
    instruction = matrix_instruction(name, case.activation_dtype)
    assert re.search(instruction, compile_product(case)["fused_kernel"].text), f"no {instruction}"


GEMV = [
    Case("sm_80", "gemv", "none", 1, None),
    Case("sm_86", "gemv", "none", 16),
    Case("sm_89", "gemv", "none", 1, hadamard=128),
    Case("sm_90", "gemv", "none", 1),
    Case("sm_90", "gemv", "none", 2, in_features=2240),
    Case("sm_90", "gemv", "float8_e4m3fn", 4),
    Case("gfx942", "gemv", "none", 1, None),
]


@pytest.mark.parametrize("case", GEMV, ids=str)
def test_gemv(case):
    # sm_90 uses the instruction of sm_80 unless the program has the four warps that wgmma takes.
    instruction = r"v_mfma_f32" if case.name == "gfx942" else r"wgmma\.mma_async|mma\.sync\.aligned\.m16n8k(16|32)"
    assert re.search(instruction, compile_product(case)["gemv_kernel"].text)


def test_gemv_in_float32():
    compile_product(Case("sm_80", "gemv", "none", 1, None, dtype=torch.float32))


DENSE = [
    Case("sm_80", "dense", "int8", 4096, hadamard=128),
    Case("sm_86", "dense", "int8", 4096, None, in_features=15360, hadamard=256),
    Case("sm_89", "dense", "int8", 4096),
    Case("sm_90", "dense", "float8_e4m3fn", 4096, hadamard=128),
    Case("sm_90", "dense", "float8_e4m3fn", 4096, in_features=2240),
    Case("gfx942", "dense", "int8", 4096, in_features=15360, hadamard=256),
]


@pytest.mark.parametrize("case", DENSE, ids=str)
def test_unpacked_first(case):
    """The quantization of activations, with their rotation, the unpacking, and the dense product."""
    kernels = compile_product(case)
    name = "sm_80" if case.name.startswith("sm_8") else case.name
    assert re.search(matrix_instruction(name, case.activation_dtype), kernels["dense_kernel"].text)
    assert {"quantize_kernel", "unpack_kernel"} < kernels.keys()


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize(("dtype", "in_features"), [(torch.bfloat16, 3072), (torch.float32, 2240)])
def test_few_rows_of_int8_layers(name, dtype, in_features):
    with launches_on(name) as launches:
        values = torch.empty(18432, in_features, dtype=torch.int8, device="cuda")
        scale = torch.empty(18432, dtype=torch.float16, device="cuda")
        launch.int8_gemv(torch.empty(1, in_features, dtype=dtype, device="cuda"), values, scale, None)
    (launched,) = launches
    assert launched.spills == 0
    assert launched.shared <= TARGETS[name].shared_memory


@pytest.mark.parametrize("exact", [False, True])
def test_float8_on_hopper(exact):
    """The wide tile, and exact sums: between matrix instructions each block's are added to float32 registers."""
    case = Case("sm_90", "dense", "float8_e4m3fn", 4096, None, in_features=15360)
    tile = (128, 128, 128) if exact else (128, 256, 128)
    kernel = compile_product(case, tile=tile, exact=exact)["dense_kernel"]
    assert re.search(matrix_instruction("sm_90", "float8_e4m3fn"), kernel.text)
    (loop,) = matrix_loops(kernel.cubin)
    registers = tile[0] * tile[1] // (8 * 32)
    assert (loop.instructions > 40 + registers) == exact


@pytest.mark.parametrize(
    "case", [Case("sm_80", "library", "int8", 4096), Case("sm_90", "library", "none", 4096)], ids=str
)
def test_library_products(case):
    assert {"unpack_kernel"} < compile_product(dataclasses.replace(case, hadamard=128)).keys()


@pytest.mark.parametrize(("name", "in_features"), [*((name, 3072) for name in TARGETS), ("sm_90", 2240)])
def test_dequantized_weights(name, in_features):
    """With one scale for a block, and with scales of single elements."""
    with launches_on(name) as launches:
        weight = fake_weight(Case(name, "", "none", 1, in_features=in_features))
        launch.unpack_float(weight, torch.bfloat16, inline_ptx=TARGETS[name].inline_ptx)
        launch.derive_multipliers(weight)
    assert [launched.name for launched in launches] == ["unpack_kernel", "derive_multipliers_kernel"]
    assert not any(launched.spills for launched in launches)


@pytest.mark.parametrize("in_features", [3072, 2240])
@pytest.mark.parametrize("kind", ["exact", "int8"])
def test_unpacking_reads_one_scale_for_sixteen_bytes(kind, in_features):
    """A thread loads its bytes, and for each plane a multiplier (and a scale): 66 to 69 loads with one per element."""
    with launches_on("sm_80") as launches:
        weight = fake_weight(Case("sm_80", "", "none", 1, in_features=in_features))
        if kind == "exact":
            launch.unpack_float(weight, torch.bfloat16, inline_ptx=True)
        else:
            launch.unpack_8bit(weight, kind, inline_ptx=True)
    assert len(re.findall(r"ld\.global", launches[0].text)) <= 10


def test_k_of_odd_blocks_takes_the_same_dense_kernel():
    """2240 is padded to 2304 in scratch: the loads need no mask, and nothing is compiled for it."""
    kernels = [
        compile_product(Case("sm_80", "dense", "int8", 4096, None, in_features=k))["dense_kernel"]
        for k in (3072, 2240)
    ]
    assert kernels[0].cubin is kernels[1].cubin


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_120", "gfx942"])
def test_rotation(name):
    with launches_on(name) as launches:
        launch.rotate(torch.empty(4096, 3072, dtype=torch.bfloat16, device="cuda"), 128)
        launch.rotate(torch.empty(16, 3072, dtype=torch.float32, device="cuda"), 256)
    assert [launched.grid for launched in launches] == [(4096, 2), (16, 2)]
    for launched in launches:
        assert launched.spills == 0
        assert launched.shared <= TARGETS[name].shared_memory


def test_decoding_leaves_the_tensor_cores_busy():
    """Instructions of a step of the int8 loop on sm_80, against the plain int8 product of the same tile.

    A step is 64 matrix instructions a warp, of 8 cycles each on an A100 (512 multiply-adds a cycle and quarter of a
    multiprocessor): 512 cycles, in which 2 warps share the issue of one instruction a cycle.
    """
    fused_case = Case("sm_80", "fused", "int8", 1024, None)
    dense_case = Case("sm_80", "dense", "int8", 4096, None)
    tiles = [(p.block_m, p.block_n, p.block_k, p.num_warps) for p in (plan_of(fused_case), plan_of(dense_case))]
    assert tiles[0] == tiles[1]
    fused = matrix_loops(compile_product(fused_case)["fused_kernel"].cubin)
    (dense,) = matrix_loops(compile_product(dense_case)["dense_kernel"].cubin)
    assert len(fused) == 4  # planes
    assert {loop.matrix_instructions for loop in fused} == {dense.matrix_instructions} == {64}
    # A mask, and a shift for all planes but one, of 32 words: 171 and 205 instructions against 139.
    assert max(loop.instructions for loop in fused) - dense.instructions <= 70
    assert max(loop.instructions for loop in fused) * 2 < 64 * 8


def test_scaling_sums_is_shorter_than_scaling_codes():
    """Group scales on sm_80, in instructions of a step: 365 to 397 where the codes would take 478 to 514 (int8)."""
    case = Case("sm_80", "fused", "int8", 1024)
    assert plan_of(case).scale_sums
    sums, codes = (
        [loop.instructions for loop in matrix_loops(compile_product(case, scale_sums)["fused_kernel"].cubin)]
        for scale_sums in (True, False)
    )
    assert max(sums) <= 0.8 * max(codes)


@pytest.mark.parametrize(("path", "counts"), [("fused", (1024, 1000, 777)), ("dense", (4096, 4097, 4099))])
def test_a_new_number_of_rows_compiles_nothing(path, counts):
    kernels = [compile_product(Case("sm_80", path, "int8", rows, None))[f"{path}_kernel"] for rows in counts]
    # Triton remembers what it compiled: the same object comes back.
    assert len({id(kernel.cubin) for kernel in kernels}) == 1
