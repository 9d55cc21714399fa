# SPDX-License-Identifier: Apache-2.0
"""Which kernel serves a product on the CPU: what was measured, as a table.

The table is for exceptions; everything else is best served by the best variant of the CPU. Without AMX there is none:
limited to AVX-512, VNNI is 1.6 to 3.7 times as fast as the better of float32 and bfloat16 `F.linear` for every layout,
limited to AVX2 the kernel is 2.2 times as fast from 16 tokens on.
"""

from typing import NamedTuple

from .native import NativeLibrary, load


DENSE = "dense"


class _Exception(NamedTuple):
    """From `tokens` tokens on `kernel` is better where fewer than `group_size` columns share a float scale.

    Multipliers need none of this: they are part of the int8 codes.
    """

    group_size: int
    tokens: int
    kernel: str


# Origin: integration_tests/benchmarks/results/choice_cpu.csv (bench_choice_cpu.py, one thread, 1536 x 1536, bfloat16).
# Tiles go through 64 columns at a time, so a shorter group wastes most of them; the last that fits counts.
_EXCEPTIONS = {
    "amx-int8": (
        _Exception(group_size=64, tokens=1, kernel="avx512-vnni"),
        _Exception(group_size=64, tokens=512, kernel=DENSE),
    ),
}


def choose(
    library: NativeLibrary, tokens: int, group_size: int, in_features: int, has_multiplier: bool, dense: bool
) -> NativeLibrary | None:
    """The kernel for a product.

    Args:
        library ([`NativeLibrary`]): the best variant of this CPU.
        tokens (`int`): M.
        group_size, in_features (`int`): columns per scale, K.
        has_multiplier (`bool`): whether groups have integer multipliers instead of float scales.
        dense (`bool`): whether a product with blocks of the dense weight may be the answer (`"auto"`).

    Returns:
        [`NativeLibrary`], or `None` for the dense product.
    """
    kernel = library.variant
    if not has_multiplier and group_size < in_features:
        for exception in _EXCEPTIONS.get(library.variant, ()):
            if (
                group_size < exception.group_size
                and tokens >= exception.tokens
                and (dense or exception.kernel != DENSE)
            ):
                kernel = exception.kernel
    if kernel == library.variant:
        return library
    return None if kernel == DENSE else load(kernel)
