# SPDX-License-Identifier: Apache-2.0
"""Host microseconds of a ternary layer on a GPU that is not there: all of the real code, launches replaced at the end.

    python integration_tests/benchmarks/gpu/host_time.py

Kernels are compiled for the named GPU; a stand-in for the driver takes the launches and drops them, and tensors are
on the CPU, whose allocator takes about a microsecond less for each buffer than a GPU's. Thread-CPU time, the
candidates in turn, the minimum of nine rounds. "operator" is what a call costs that finds nothing prepared. Products
of the vendor's library are replaced, too: what they take on the host, nn.Linear pays as well.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch


sys.path.insert(0, str(Path(__file__).parents[3]))
from diffusers_ternary.kernels.ops import prepared, schema, ternary_linear
from diffusers_ternary.kernels.ops import triton as registered
from diffusers_ternary.kernels.triton import product
from diffusers_ternary.layers import TernaryLinear
from diffusers_ternary.ternarize import ternarize
from integration_tests.support.gpu_compiler import TARGETS
from integration_tests.support.stand_in_driver import standing_in


ROUNDS, CALLS = 9, 300
N = K = 256
# Target, rows, activations, what is launched.
CASES = (
    ("sm_90", 1, "none", "gemv"),
    ("sm_80", 40, "int8", "quantize, fused"),
    ("sm_80", 2000, "int8", "quantize, unpack, dense"),
    ("sm_90", 2000, "float8_e4m3fn", "quantize, unpack, _scaled_mm"),
    ("sm_90", 2000, "none", "unpack, F.linear"),
)


def microseconds(call: Callable[[], object]) -> float:
    start = time.thread_time()
    for _ in range(CALLS):
        call()
    return (time.thread_time() - start) / CALLS * 1e6


def no_quick_way(*_: object) -> None:
    return None


def candidates(rows: int, activation_dtype: str) -> Iterator[tuple[str, Callable[[], object]]]:
    packed = ternarize(torch.randn(N, K), group_size=64, scales="double")
    bias = torch.randn(N, dtype=torch.bfloat16)
    layer = TernaryLinear.from_weight(packed, bias, activation_dtype=activation_dtype)
    x = torch.randn(rows, K, dtype=torch.bfloat16)
    arguments = (x, layer.weight, layer.scales, layer.weight_multiplier, layer.bias, K, 64, activation_dtype, 0)

    def operator() -> torch.Tensor:
        schema.quick_linear = no_quick_way
        y = ternary_linear(*arguments)
        schema.quick_linear = prepared.quick_linear
        return y

    yield "layer", lambda: layer(x)
    yield "operator", operator
    plain = torch.nn.Linear(1, 1, dtype=torch.bfloat16)
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    yield "nn.Linear, 1 x 1", lambda: plain(one)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"{'target':<8}{'rows':>6}  {'launched':<32}{'layer':>8}{'operator':>10}{'nn.Linear 1 x 1':>17}  us")
    always = lambda *_: True  # noqa: E731
    drop = lambda *_, **__: taken  # noqa: E731
    taken = torch.empty(2000, N, dtype=torch.bfloat16)
    for target, rows, activation_dtype, launched in CASES:
        prepared.prepared_products.cache_clear()
        with (
            torch.no_grad(),
            standing_in(TARGETS[target], noted=False),
            mock.patch.dict(prepared._PREPARE, {"cpu": prepared._prepare_triton}),
            mock.patch.dict(ternary_linear._backend_fns, {"cpu": registered._linear}),
            mock.patch.object(prepared, "triton_serves", always),
            mock.patch.object(registered, "triton_serves", always),
            mock.patch.object(torch, "_scaled_mm", drop),
            mock.patch.object(product, "F", SimpleNamespace(linear=drop)),
        ):
            calls = dict(candidates(rows, activation_dtype))
            best = dict.fromkeys(calls, float("inf"))
            for _ in range(ROUNDS):
                for name, call in calls.items():
                    best[name] = min(best[name], microseconds(call))
        layer, operator, linear = best.values()
        print(f"{target:<8}{rows:>6}  {launched:<32}{layer:>8.1f}{operator:>10.1f}{linear:>17.1f}", flush=True)
    prepared.prepared_products.cache_clear()


if __name__ == "__main__":
    main()
