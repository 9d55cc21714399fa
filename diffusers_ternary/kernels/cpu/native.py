# SPDX-License-Identifier: Apache-2.0
"""The compiled library: found, checked against torch, and called through ctypes (which releases the GIL)."""

import ctypes
import functools
import importlib.util
import logging
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...format import pack_planes
from ..operands import PackedWeight


logger = logging.getLogger(__name__)

ABI_VERSION = 4
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ERRORS = {-1: "out of memory", -2: "this CPU lacks the instructions of the chosen kernel"}
# Dtype in which a whole model is fastest beside a variant. The layers take every dtype; what lies between them
# (attention, norms) is faster in bfloat16 where the CPU has tiles for it, and much slower where it has no such
# instructions (SANA 2x).
FASTEST_DTYPES = {"amx-int8": "bfloat16"}
_ARGUMENTS = struct.Struct("16q")  # dt_args in ternary.h
_SIGNATURES = {
    "dt_abi_version": [],
    "dt_variant_name": [ctypes.c_int64],
    "dt_variant_supported": [ctypes.c_int64],
    "dt_linear": [ctypes.c_char_p, ctypes.c_int64],
    "dt_accumulate": [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p],
    "dt_quantize_rows": [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p],
    "dt_dequantize": [ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64],
    "dt_twn": [ctypes.c_void_p, *[ctypes.c_int64] * 5, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64],
    "dt_code_columns": [ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_void_p] * 5, *[ctypes.c_int64] * 5],
    "dt_group_sums": [*[ctypes.c_void_p, ctypes.c_int64] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p],
    "dt_base3_to_planes": [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p],
    "dt_planes_to_base3": [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p],
}


@dataclass(frozen=True)
class NativeLibrary:
    """One kernel variant of the compiled library.

    The methods take `arguments` from [`NativeLibrary.arguments`], which holds bare addresses: the tensors must
    outlive the call.
    """

    functions: ctypes.CDLL
    variant: str
    variant_index: int
    pack: ClassVar[Callable[..., bytes]] = _ARGUMENTS.pack

    def arguments(self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out: torch.Tensor) -> bytes:
        """Packs a call.

        Args:
            x (`torch.Tensor`): `[M, K]` float32, bfloat16 or float16, last stride 1.
            weight ([`PackedWeight`]): contiguous.
            bias (`torch.Tensor`, *optional*): `[N]`, contiguous.
            out (`torch.Tensor`): `[M, N]`, dtype of `x`, last stride 1.
        """
        return _ARGUMENTS.pack(
            self.variant_index,
            x.data_ptr(),
            x.stride(0),
            DTYPES[x.dtype],
            weight.packed.data_ptr(),
            weight.scale.data_ptr(),
            DTYPES[weight.scale.dtype],
            0 if weight.multiplier is None else weight.multiplier.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if bias is None else DTYPES[bias.dtype],
            out.data_ptr(),
            out.stride(0),
            x.shape[0],
            weight.out_features,
            weight.in_features,
            min(weight.group_size, weight.in_features),
        )

    def linear(self, arguments: bytes, workers: int) -> int:
        """The layer by `workers` threads; returns how many tokens hold an infinity.

        The call returns when all threads are done, also when a signal arrives meanwhile: Python handles it afterward.
        """
        return checked(self.functions.dt_linear(arguments, workers))

    def dequantize(self, weight: PackedWeight, out: torch.Tensor, workers: int) -> None:
        """The dense weight as float32 `[N, K]` into `out`, by `workers` threads."""
        arguments = self.arguments(out[:0], weight, None, out[:0])
        checked(self.functions.dt_dequantize(arguments, 0, weight.out_features, out.data_ptr(), workers))

    def tile_sums(self, x: torch.Tensor, weight: torch.Tensor, *, group_size: int) -> torch.Tensor:
        """Test hook: the int32 sums of the layer's own tiles.

        Args:
            x (`torch.Tensor`): int8 `[M, K]` in -127..127, contiguous.
            weight (`torch.Tensor`): int8 `[N, ceil(K / 4)]`.
            group_size (`int`): columns per sum.

        Returns:
            `torch.Tensor`: int32 `[M, G, N]`.
        """
        tokens, in_features = x.shape
        out = torch.empty(tokens, -(-in_features // group_size), weight.shape[0], dtype=torch.int32)
        unused = torch.ones(tokens, 1)
        arguments = self.arguments(unused, PackedWeight(weight, unused, None, in_features, group_size), None, unused)
        checked(self.functions.dt_accumulate(arguments, x.data_ptr(), out.data_ptr()))
        return out

    def quantize(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Test hook: int8 `[M, K]` and float32 scales `[M]` as the layer quantizes `x` `[M, K]`."""
        q = torch.empty(x.shape, dtype=torch.int8)
        scales = torch.empty(x.shape[0])
        in_features = x.shape[1]
        unused = PackedWeight(torch.zeros(1, 1, dtype=torch.int8), scales, None, in_features, in_features)
        arguments = self.arguments(x, unused, None, scales[:, None])
        checked(self.functions.dt_quantize_rows(arguments, q.data_ptr(), scales.data_ptr()))
        return q, scales


def checked(result: int) -> int:
    """Returns what a function of the library returned; raises if that is an error code."""
    if result < 0:
        raise RuntimeError(f"The native CPU kernel failed: {ERRORS.get(result, result)}.")
    return result


@functools.cache
def open_library() -> ctypes.CDLL | str:
    """The library with its signatures set, or the reason why there is none."""
    spec = importlib.util.find_spec(f"{__package__}._native")
    if spec is None or spec.origin is None:
        return "the package was installed without its compiled library (no C compiler?)"
    try:
        functions = ctypes.CDLL(spec.origin)
        for name, types in _SIGNATURES.items():
            function = getattr(functions, name)
            function.argtypes = types
            function.restype = ctypes.c_char_p if name == "dt_variant_name" else ctypes.c_int64
    except (OSError, AttributeError) as error:
        return f"the compiled library cannot be loaded: {error}"
    if functions.dt_abi_version() != ABI_VERSION:
        return f"the compiled library has version {functions.dt_abi_version()}, expected {ABI_VERSION}: reinstall"
    return functions


def variants() -> list[str]:
    """Names of the variants this CPU runs, best first; empty without the compiled library."""
    functions = open_library()
    if isinstance(functions, str):
        return []
    names = []
    index = 0
    while (name := functions.dt_variant_name(index)) is not None:
        if functions.dt_variant_supported(index):
            names.append(name.decode())
        index += 1
    return names


def _variant_index(functions: ctypes.CDLL, variant: str) -> int:
    index = 0
    while functions.dt_variant_name(index).decode() != variant:
        index += 1
    return index


def passes_self_test(library: NativeLibrary) -> bool:
    """Whether the variant's integers equal torch's, for a GEMV and for tiles with tails in every direction."""
    generator = torch.Generator().manual_seed(0)
    for tokens, out_features, in_features, group_size in ((2, 37, 267, 267), (27, 37, 267, 64)):
        codes = torch.randint(-1, 2, (out_features, in_features), generator=generator, dtype=torch.int8)
        x = torch.randint(-127, 128, (tokens, in_features), generator=generator, dtype=torch.int8)
        sums = library.tile_sums(x, pack_planes(codes), group_size=group_size)
        parts = zip(x.long().split(group_size, 1), codes.long().split(group_size, 1), strict=True)
        if not torch.equal(sums, torch.stack([a @ b.T for a, b in parts], 1).int()):
            return False
    return True


@functools.cache
def load(variant: str | None = None) -> NativeLibrary | None:
    """The compiled library with the best kernel of this CPU.

    Args:
        variant (`str`, *optional*): one of [`variants`], instead of the best.

    Returns:
        `NativeLibrary`, or `None` (logged once, with the reason) if there is none or it computes wrong numbers.

    Raises:
        ValueError: if `variant` is not one that this CPU runs.
    """
    functions = open_library()
    if isinstance(functions, str):
        logger.warning("Ternary layers on the CPU use plain torch: %s.", functions)
        return None
    names = variants()
    if variant is not None and variant not in names:
        raise ValueError(f"variant={variant!r} is not one of {', '.join(names)}.")
    # Plain C is for comparison: at 256 tokens it reaches 0.16 times float32, plain torch 1.2 times.
    for name in [name for name in names if name != "scalar"] if variant is None else [variant]:
        library = NativeLibrary(functions, name, _variant_index(functions, name))
        if passes_self_test(library):
            if variant is None:
                logger.info(
                    "Ternary layers on the CPU use the native kernel %s; models run fastest in %s here.",
                    name,
                    FASTEST_DTYPES.get(name, "float32"),
                )
            return library
        logger.warning("The native kernel %s computes wrong numbers on this CPU and is not used.", name)
    logger.warning("Ternary layers on the CPU use plain torch: no vector kernel for this CPU.")
    return None
