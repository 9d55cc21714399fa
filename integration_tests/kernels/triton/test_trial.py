# SPDX-License-Identifier: Apache-2.0
"""The first use of kernels on a device: broken ones are left out with one warning, and the result is right.

The kernels run for real (where no GPU is, under the interpreter, by `test_interpreted.py`); faults are
put into them.
"""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from diffusers_ternary.kernels import reference
from diffusers_ternary.ternarize import TernaryWeight, rotate, ternarize
from integration_tests.support.interpreter import skip_without_interpreter


triton: Any = pytest.importorskip("triton")
INTERPRETED = bool(triton.knobs.runtime.interpret)
if INTERPRETED:
    skip_without_interpreter()
elif not torch.cuda.is_available():
    pytest.skip("no GPU: run by test_interpreted.py", allow_module_level=True)

from triton.compiler.errors import CompilationError  # noqa: E402

from diffusers_ternary.kernels import triton as kernels  # noqa: E402
from diffusers_ternary.kernels.triton import devices, launch, plain, product  # noqa: E402
from diffusers_ternary.kernels.triton.dispatch import PLAIN, Plan, Target  # noqa: E402
from diffusers_ternary.kernels.triton.trial import Trials, problem_of, trial_weight  # noqa: E402
from diffusers_ternary.kernels.triton.weights import PackedWeight  # noqa: E402
from integration_tests.support.operands import of_parts, of_weight_parts  # noqa: E402


DEVICE = "cpu" if INTERPRETED else "cuda"
Fault = Callable[[torch.Tensor, dict[str, Any]], None]


@pytest.fixture(autouse=True)
def _first_use(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing was tried before; nothing is measured."""
    torch.manual_seed(0)
    monkeypatch.setattr(product, "tuner_of", lambda *_: None)
    devices.trials_of.cache_clear()
    yield
    devices.trials_of.cache_clear()


class Faulty:
    """A kernel whose launches end with a fault, given the output and the options of the launch."""

    def __init__(self, kernel: Any, fault: Fault, output: int) -> None:
        self.kernel, self.fault, self.output = kernel, fault, output
        self.launches: list[dict[str, Any]] = []

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def run(*arguments: Any, **options: Any) -> None:
            self.launches.append(options)
            self.kernel[grid](*arguments, **options)
            self.fault(arguments[self.output], options)

        return run


def raising(_: torch.Tensor, options: dict[str, Any]) -> None:
    raise CompilationError("", None, "no such instruction")


def wrong_corner(y: torch.Tensor, options: dict[str, Any]) -> None:
    y[-1, -1] += 1 + y.abs().max()


def not_a_number(y: torch.Tensor, options: dict[str, Any]) -> None:
    y[0, 0] = float("nan")


def weight_of(layout: str = "double", hadamard: int = 0, n: int = 48, k: int = 256) -> TernaryWeight:
    dense = torch.randn(n, k, generator=torch.Generator().manual_seed(0))
    size = None if layout == "row" else 64
    return ternarize(dense, group_size=size, scales="double" if layout == "double" else "group", hadamard=hadamard)


def linear(x: torch.Tensor, w: TernaryWeight, activation_dtype: str = "none") -> torch.Tensor:
    options = {"in_features": w.spec.in_features, "group_size": w.spec.group_size, "hadamard": w.spec.hadamard}
    tensors = [None if t is None else t.to(DEVICE) for t in (w.packed, w.scale, w.multiplier)]
    return of_parts(kernels.linear)(x.to(DEVICE), *tensors, None, activation_dtype=activation_dtype, **options).cpu()


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_good_kernels_pass_in_silence(caplog, monkeypatch):
    served = []
    monkeypatch.setattr(product, "run", lambda plan, *rest, run=product.run: served.append(plan) or run(plan, *rest))
    x, w = torch.randn(5, 256).half(), weight_of()
    for activation_dtype in ("none", "int8", "float8_e4m3fn"):
        y = linear(x, w, activation_dtype)
        assert problem_of(y, x.float() @ w.dequantize().T, 0.1) is None
    assert warnings_of(caplog) == []
    assert {plan.path for plan in served} == {"gemv"}


@pytest.mark.parametrize("fault", [raising, wrong_corner, not_a_number])
def test_the_next_candidate_serves_and_one_warning_names_the_broken_one(fault, caplog, monkeypatch):
    first: list[int] = []

    def of_the_first_tile(y: torch.Tensor, options: dict[str, Any]) -> None:
        first[:] = first or [options["BLOCK_N"]]
        if options["BLOCK_N"] == first[0]:
            fault(y, options)

    faulty = Faulty(launch.gemv_kernel, of_the_first_tile, 7)
    monkeypatch.setattr(launch, "gemv_kernel", faulty)
    x, w = torch.randn(5, 256).half(), weight_of()
    for _ in range(3):
        assert problem_of(linear(x, w), x.float() @ w.dequantize().T, 3e-3) is None
    (warning,) = warnings_of(caplog)
    assert "The kernel gemv 8x32x128 (none activations, torch.float16) does not work on" in warning
    assert [options["BLOCK_N"] for options in faulty.launches] == [32, 16, 16, 16, 16]  # two trials, three products


@pytest.mark.parametrize("activation_dtype", ["none", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("layout", ["row", "group", "double"])
def test_the_reference_serves_at_last(activation_dtype, layout, caplog, monkeypatch):
    monkeypatch.setattr(launch, "gemv_kernel", Faulty(launch.gemv_kernel, raising, 7))
    x, w = torch.randn(5, 256).half(), weight_of(layout, hadamard=64)
    y = linear(x, w, activation_dtype)
    spec = w.spec
    expected = of_parts(reference.linear)(
        *(x.float(), w.packed, w.scale, w.multiplier, None),
        in_features=256,
        group_size=spec.group_size,
        activation_dtype=activation_dtype,
        hadamard=64,
    )
    # The group layout becomes integers of 1..63.
    assert problem_of(y, expected, 3e-3 if activation_dtype == "none" or layout != "group" else 0.02) is None
    assert len(warnings_of(caplog)) == len({*warnings_of(caplog)}) >= 1


@pytest.mark.parametrize("broken", ["quantize_kernel", "unpack_kernel"])
def test_whatever_a_product_launches_is_tried_with_it(broken, caplog, monkeypatch):
    fault = Faulty(getattr(launch, broken), lambda out, _: out.zero_(), 1 if broken == "quantize_kernel" else 3)
    monkeypatch.setattr(launch, broken, fault)
    x, w = torch.randn(20, 256).half(), weight_of(n=40)
    y = linear(x, w, "int8")
    assert problem_of(y, x.float() @ w.dequantize().T, 0.03) is None
    assert bool(warnings_of(caplog)) == (broken == "quantize_kernel")  # the first plan, fused, unpacks nothing


def test_unpacking_and_rotating_have_a_way_out(caplog, monkeypatch):
    monkeypatch.setattr(launch, "unpack_kernel", Faulty(launch.unpack_kernel, wrong_corner, 3))
    monkeypatch.setattr(launch, "rotate_kernel", Faulty(launch.rotate_kernel, raising, 1))
    w, x = weight_of(), torch.randn(3, 300).half()
    options = {"in_features": 256, "group_size": 64, "dtype": torch.float16}
    for _ in range(2):
        dense = of_weight_parts(kernels.dequantize)(
            w.packed.to(DEVICE), w.scale.to(DEVICE), w.multiplier.to(DEVICE), **options
        )
        torch.testing.assert_close(dense.cpu(), w.dequantize().half())
        torch.testing.assert_close(kernels.rotate(x.to(DEVICE), 128).cpu(), rotate(x, 128), rtol=2e-3, atol=1e-5)
    unpacks, rotates = warnings_of(caplog)
    assert "The kernel that unpacks to torch.float16 does not work" in unpacks
    assert "The kernel that rotates torch.float16 does not work" in rotates


def test_nothing_is_tried_while_a_graph_is_captured(caplog, monkeypatch):
    faulty = Faulty(launch.gemv_kernel, wrong_corner, 7)
    monkeypatch.setattr(launch, "gemv_kernel", faulty)
    x, w = torch.randn(5, 256).half(), weight_of()
    with monkeypatch.context() as capture:
        capture.setattr(product, "is_capturing", lambda _: True)
        linear(x, w)
    assert len(faulty.launches) == 1
    linear(x, w)
    assert warnings_of(caplog)
    # What is known to be wrong by then does not enter a graph.
    faulty.launches.clear()
    monkeypatch.setattr(product, "is_capturing", lambda _: True)
    assert problem_of(linear(x, w), x.float() @ w.dequantize().T, 3e-3) is None
    assert faulty.launches == []


def test_a_full_memory_says_nothing_about_a_kernel(caplog, monkeypatch):
    def full(y: torch.Tensor, options: dict[str, Any]) -> None:
        raise torch.OutOfMemoryError("nothing left")

    x, w = torch.randn(5, 256).half(), weight_of()
    with monkeypatch.context() as once:
        once.setattr(launch, "gemv_kernel", Faulty(launch.gemv_kernel, full, 7))
        with pytest.raises(torch.OutOfMemoryError):
            linear(x, w)
    assert problem_of(linear(x, w), x.float() @ w.dequantize().T, 3e-3) is None
    assert warnings_of(caplog) == []


def test_trials_have_the_tiles_and_the_layout_of_what_serves():
    w = weight_of("double", n=300, k=250)
    packed = PackedWeight(w.packed, w.scale, w.multiplier.view(torch.int8), 250, w.spec.group_size)
    sample = trial_weight(packed, 140)
    assert sample.packed.shape == (140, 63)
    assert sample.scale.dtype == packed.scale.dtype
    assert {*plain.codes(sample).unique().tolist()} == {-1, 0, 1}
    assert (sample.packed[:, -2:] & 0b11).count_nonzero() == 0  # plane 3 ends with columns 250 and 251, of 0..249
    shapes = []

    def run(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
        shapes.append((*x.shape, weight.out_features))
        return plain.product(x, weight, bias, "none")

    for plan, rows in ((Plan("fused", 128, 256, 64), 4096), (Plan("gemv", 8, 32, 256), 1), (Plan("library"), 4096)):
        target = devices.target_of(DEVICE, 0)
        problem = product.product_problem(run, plan, packed, None, "none", target, rows=rows, dtype=torch.float32)
        assert problem is None
    assert shapes == [(131, 250, 284), (1, 250, 60), (131, 250, 156)]


def test_long_float8_sums_are_taken_exactly_where_the_others_lose_digits(caplog):
    """A matrix unit of few bits, by the size of its error; the exact twin is judged as all others are."""
    w = weight_of("row", n=64, k=8256)
    packed = PackedWeight(w.packed, w.scale, None, 8256, 8256)
    hopper = Target("cuda", 90, 1 << 17)
    found = {}
    for error in (1e-3, 9e-3):

        def run(
            x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, error: float = error
        ) -> torch.Tensor:
            y = plain.product(x, weight, bias, "float8_e4m3fn")
            return y + error * y.std() * torch.randn_like(y)

        for exact in (False, True):
            plan = Plan("dense", 128, 128, 128, exact=exact)
            found[error, exact] = product.product_problem(
                run, plan, packed, None, "float8_e4m3fn", hopper, rows=4096, dtype=torch.bfloat16
            )
    assert [found[key] is None for key in sorted(found)] == [True, True, False, True]
    trials = Trials("cuda:0")
    with caplog.at_level(logging.INFO, "diffusers_ternary"):
        assert not trials.passes("key", "The kernel dense", lambda: found[9e-3, False])
    (record,) = caplog.records
    assert (record.levelno, "relative error 0.00" in record.getMessage()) == (logging.INFO, True)


@pytest.mark.parametrize("activation_dtype", ["none", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("layout", ["row", "double"])
@pytest.mark.parametrize("hadamard", [0, 32])
def test_plain_torch_is_the_reference(activation_dtype, layout, hadamard):
    w, x = weight_of(layout, hadamard, n=33, k=250), torch.randn(7, 250)
    multiplier = None if w.multiplier is None else w.multiplier.view(torch.int8)
    packed = PackedWeight(w.packed, w.scale, multiplier, 250, w.spec.group_size, hadamard)
    bias = torch.randn(33)
    options = {"in_features": 250, "group_size": w.spec.group_size, "hadamard": hadamard}
    expected = of_parts(reference.linear)(
        x, w.packed, w.scale, w.multiplier, bias, activation_dtype=activation_dtype, **options
    )
    assert problem_of(plain.product(x, packed, bias, activation_dtype), expected, 1e-5) is None
    assert torch.equal(
        product.run(PLAIN, x, packed, bias, activation_dtype, None), plain.product(x, packed, bias, activation_dtype)
    )
