# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel compiled for GPUs that need not be there: spills, matrix instruction, shared memory.

The interpreter accepts what GPUs reject; these checks read what the compiler made of the plans that dispatch trusts.
"""

import dataclasses
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch


triton: Any = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("compile checks need Triton without its interpreter", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from diffusers_ternary.kernels.triton.activations import quantize_kernel  # noqa: E402
from diffusers_ternary.kernels.triton.dense import dense_kernel  # noqa: E402
from diffusers_ternary.kernels.triton.dispatch import Plan, Request, Target, candidates  # noqa: E402
from diffusers_ternary.kernels.triton.epilogue import epilogue_kernel  # noqa: E402
from diffusers_ternary.kernels.triton.fused import fused_kernel  # noqa: E402
from diffusers_ternary.kernels.triton.gemv import gemv_kernel  # noqa: E402
from diffusers_ternary.kernels.triton.unpack import derive_multipliers_kernel, unpack_kernel  # noqa: E402


# Bytes of shared memory per program, from the vendors' programming guides.
TARGETS = {
    "sm_80": Target("cuda", 80, 163 * 1024),
    "sm_86": Target("cuda", 86, 99 * 1024),
    "sm_89": Target("cuda", 89, 99 * 1024),
    "sm_90": Target("cuda", 90, 227 * 1024),
    "gfx942": Target("hip", "gfx942", 64 * 1024),
}
KINDS = {"none": "float", "int8": "int8", "float8_e4m3fn": "fp8"}
POINTERS = {
    "weight_ptr": "*i8",
    "scale_ptr": "*fp16",
    "multiplier_ptr": "*i8",
    "row_scale_ptr": "*fp32",
    "x_scale_ptr": "*fp32",
    "bias_ptr": "*bf16",
    "y_ptr": "*bf16",
    "acc_ptr": "*i32",
    "out_ptr": "*i8",
}
MATRIX_INSTRUCTIONS = {
    ("sm_80", "float"): r"mma\.sync\.aligned\.m16n8k16\S*bf16",
    ("sm_80", "int8"): r"mma\.sync\.aligned\.m16n8k32\S*s8",
    ("sm_89", "fp8"): r"mma\.sync\.aligned\.m16n8k32\S*e4m3",
    ("sm_90", "float"): r"wgmma\.mma_async\S*bf16",
    ("sm_90", "int8"): r"wgmma\.mma_async\S*s8",
    ("sm_90", "fp8"): r"wgmma\.mma_async\S*e4m3",
    ("gfx942", "float"): r"v_mfma_f32_\S*bf16",
    ("gfx942", "int8"): r"v_mfma_i32_\S*i8",
}


def matrix_instruction(name: str, kind: str) -> str:
    """The instruction to expect; sm_86 and sm_89 share those of sm_80."""
    return MATRIX_INSTRUCTIONS.get((name, kind)) or MATRIX_INSTRUCTIONS["sm_80", kind]


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a kernel."""

    text: str
    shared: int
    spills: int


def compile_kernel(
    name: str, kernel: Any, constants: dict[str, Any], *, pointers: dict[str, str] | None = None, **options: int
) -> Compiled:
    """Compiles for a named target, with 16-byte aligned pointers and sizes as real layers have."""
    types = {**POINTERS, **(pointers or {})}
    signature, attributes = {}, {}
    for position, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        signature[argument] = "fp32" if argument == "factor" else types.get(argument, "i32")
        if argument != "factor":
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    if name.startswith("gfx"):
        target = GPUTarget("hip", name, 64)
    else:
        target = GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    compiled = triton.compile(source, target=target, options={"enable_fp_fusion": True, **options})
    if name.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        spills = sum(int(n) for n in re.findall(r"\.[vs]gpr_spill_count:\s+(\d+)", text))
    else:
        text = compiled.asm["ptx"]
        spills = local_bytes(compiled.asm["cubin"])
    return Compiled(text, compiled.metadata.shared, spills)


def local_bytes(cubin: bytes) -> int:
    """Bytes of stack and local memory per thread, which spilled registers take."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"ternary-{os.getpid()}.cubin"
    path.write_bytes(cubin)
    try:
        report = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    finally:
        path.unlink()
    return sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", report))


def request(rows: int, activation_dtype: str, groups: int = 0) -> Request:
    """A product whose scales are one per row (0), per row and block (1), or per element (2)."""
    in_features = 2240 if groups == 2 else 3072
    group_size = in_features if groups == 0 else 128
    return Request(rows, 3072, in_features, group_size, groups == 0, torch.bfloat16, activation_dtype)


def plan_of(name: str, path: str, rows: int, activation_dtype: str, groups: int = 0) -> Plan:
    """The first plan of a path that dispatch offers."""
    offered = candidates(TARGETS[name], request(rows, activation_dtype, groups), activation_dtype)
    return next(plan for plan in offered if plan.path == path)


def product_constants(name: str, plan: Plan, kind: str, groups: int) -> dict[str, Any]:
    constants = {
        "KIND": kind,
        "GROUPS": groups,
        "EVEN_K": True,
        "ASM": TARGETS[name].inline_ptx,
        "BLOCK_M": plan.block_m,
        "BLOCK_N": plan.block_n,
        "BLOCK_K": plan.block_k,
    }
    if plan.path == "fused":
        constants |= {"WEIGHT_LEFT": plan.weight_left, "GROUP_M": 8}
    if kind == "float":
        constants["x_scale_ptr"] = None
    if groups == 0:
        constants["multiplier_ptr"] = None
    elif kind == "float":
        constants["row_scale_ptr"] = None
    return constants


def check(name: str, compiled: Compiled, instruction: str | None = None) -> None:
    assert compiled.spills == 0
    assert compiled.shared <= TARGETS[name].shared_memory
    if instruction is not None:
        assert re.search(instruction, compiled.text), f"no {instruction}"


FUSED = [
    ("sm_80", "none", 0),
    ("sm_80", "int8", 0),
    ("sm_86", "int8", 0),
    ("sm_89", "int8", 0),
    ("sm_89", "float8_e4m3fn", 0),
    ("sm_90", "none", 1),
    ("sm_90", "float8_e4m3fn", 0),
    ("sm_90", "int8", 1),
    ("gfx942", "none", 0),
    ("gfx942", "int8", 0),
]


@pytest.mark.parametrize(("name", "activation_dtype", "groups"), FUSED)
def test_fused(name, activation_dtype, groups):
    plan = plan_of(name, "fused", 1024, activation_dtype, groups)
    kind = KINDS[activation_dtype]
    x = "*bf16" if kind == "float" else "*i8"
    compiled = compile_kernel(
        name,
        fused_kernel,
        product_constants(name, plan, kind, groups),
        pointers={"x_ptr": x},
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )
    check(name, compiled, matrix_instruction(name, kind))


@pytest.mark.parametrize(
    ("name", "groups"), [("sm_80", 0), ("sm_86", 1), ("sm_89", 0), ("sm_90", 1), ("sm_90", 2), ("gfx942", 0)]
)
def test_gemv(name, groups):
    plan = plan_of(name, "gemv", 1, "none", groups)
    compiled = compile_kernel(
        name,
        gemv_kernel,
        product_constants(name, plan, "float", groups),
        pointers={"x_ptr": "*bf16"},
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )
    # sm_90 uses the instruction of sm_80 unless the program has the four warps that wgmma takes.
    check(name, compiled, r"wgmma\.mma_async|mma\.sync\.aligned\.m16n8k16" if name.startswith("sm") else r"v_mfma_f32")


def test_gemv_in_float32():
    plan = candidates(TARGETS["sm_80"], dataclasses.replace(request(1, "none"), dtype=torch.float32), "none")[0]
    compiled = compile_kernel(
        "sm_80",
        gemv_kernel,
        product_constants("sm_80", plan, "float", 0),
        pointers={"x_ptr": "*fp32", "y_ptr": "*fp32"},
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )
    check("sm_80", compiled)


@pytest.mark.parametrize(
    ("name", "kind"), [("sm_80", "int8"), ("sm_86", "int8"), ("sm_89", "int8"), ("sm_90", "fp8"), ("gfx942", "int8")]
)
def test_dense(name, kind):
    plan = plan_of(name, "dense", 4096, "float8_e4m3fn" if kind == "fp8" else "int8")
    constants = {
        "KIND": kind,
        "EVEN_K": True,
        "NO_PREFETCH": TARGETS[name].register_operands,
        "BLOCK_M": plan.block_m,
        "BLOCK_N": plan.block_n,
        "BLOCK_K": plan.block_k,
        "GROUP_M": 8,
    }
    compiled = compile_kernel(
        name,
        dense_kernel,
        constants,
        pointers={"x_ptr": "*i8"},
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )
    check(name, compiled, matrix_instruction(name, kind))


UNPACK = [
    ("sm_80", "int8", 1),
    ("sm_86", "exact", 1),
    ("sm_89", "int8", 0),
    ("sm_90", "fp8", 2),
    ("sm_90", "exact", 2),
    ("gfx942", "int8", 1),
]


@pytest.mark.parametrize(("name", "kind", "groups"), UNPACK)
def test_unpack(name, kind, groups):
    constants = {
        "KIND": kind,
        "GROUPS": groups,
        "ASM": TARGETS[name].inline_ptx,
        "BLOCK_N": 16,
        "BLOCK_K": 128,
    }
    if groups == 0:
        constants["multiplier_ptr"] = None
    if kind == "exact":
        constants["row_scale_ptr"] = None
    out = "*bf16" if kind == "exact" else "*i8"
    check(name, compile_kernel(name, unpack_kernel, constants, pointers={"out_ptr": out}, num_warps=4))


@pytest.mark.parametrize(
    ("name", "fp8"), [("sm_80", False), ("sm_86", False), ("sm_89", True), ("sm_90", True), ("gfx942", False)]
)
def test_quantize(name, fp8):
    constants = {"FP8": fp8, "ONE_BLOCK": True, "BLOCK_K": 16384}
    check(name, compile_kernel(name, quantize_kernel, constants, pointers={"x_ptr": "*bf16"}, num_warps=16))


@pytest.mark.parametrize("name", TARGETS)
def test_small_kernels(name):
    check(name, compile_kernel(name, epilogue_kernel, {"BLOCK_M": 16, "BLOCK_N": 256}, num_warps=4))
    check(name, compile_kernel(name, derive_multipliers_kernel, {"BLOCK_G": 128}, num_warps=1))
