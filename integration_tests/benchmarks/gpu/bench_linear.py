# SPDX-License-Identifier: Apache-2.0
"""One linear layer on a GPU: every ternary path against cuBLAS and the layers of other libraries.

    python integration_tests/benchmarks/gpu/bench_linear.py    # at most eight minutes, the most telling shapes first
    TRITON_INTERPRET=1 python integration_tests/benchmarks/gpu/bench_linear.py --dry-run    # no GPU: tiny shapes

Whole layers: quantization of activations, unpacking and epilogue included; compiling and tuning are not. Candidates
are interleaved, caches are cold, each output is checked (on poisoned memory) before it is timed; the device sleeps
while the host enqueues, whose microseconds have a column of their own. `compile_ahead.py` before saves the minutes in
which one core compiles. Other libraries'
layers join where they are installed: `pip install torchao gemlite sdnq bitsandbytes`. The table comes last, then the
goals; results/linear_<device>.csv and .png hold the same figures.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from gpu_timing import Stopwatch, Timing
from peers import Peer, installed
from report import Table, device_name
from torch import nn

from diffusers_ternary.kernels.triton import launch, prepare, product
from diffusers_ternary.kernels.triton.devices import target_of
from diffusers_ternary.kernels.triton.dispatch import Plan, Request, candidates
from diffusers_ternary.kernels.triton.weights import Layout, PackedWeight
from diffusers_ternary.ternarize import rotate, ternarize


RESULTS = Path(__file__).parent / "results"
GROUP = 128
ROTATION = 128
BASELINE = "cuBLAS bf16"


@dataclass(frozen=True)
class Shape:
    """One product of a model: `count` layers of it in a denoising step."""

    model: str
    m: int
    n: int
    k: int
    count: int


# 1024 px, batch 1; ordered so that a short run has the goals' shapes: a large product, a single row, each model.
SHAPES = (
    Shape("FLUX single", 4608, 12288, 3072, 38),
    Shape("FLUX single", 4608, 3072, 3072, 114),
    Shape("FLUX modulation", 1, 18432, 3072, 38),
    Shape("FLUX single", 4608, 3072, 15360, 38),
    Shape("SANA", 1024, 2240, 2240, 100),
    Shape("SD3.5", 4096, 1536, 1536, 144),
    Shape("FLUX image", 4096, 3072, 3072, 76),
    Shape("FLUX image", 4096, 12288, 3072, 19),
    Shape("FLUX image", 4096, 3072, 12288, 19),
    Shape("FLUX text", 512, 3072, 3072, 76),
    Shape("FLUX text", 512, 12288, 3072, 19),
    Shape("FLUX text", 512, 3072, 12288, 19),
    Shape("FLUX modulation", 1, 9216, 3072, 38),
    Shape("SANA 1x1 conv", 1024, 11200, 2240, 20),
    Shape("SANA 1x1 conv", 1024, 2240, 5600, 20),
    Shape("SD3.5", 4096, 6144, 1536, 24),
    Shape("SD3.5", 4096, 1536, 6144, 24),
    Shape("SD3.5 text", 333, 1536, 1536, 92),
)
DRY_SHAPES = (Shape("dry", 3, 48, 64, 1), Shape("dry", 33, 48, 256, 1))


@dataclass(frozen=True)
class Goal:
    """What a layer is to reach over cuBLAS bf16 on every shape of `least_rows` to `most_rows` rows."""

    layer: str
    least_rows: int
    most_rows: int
    speed: float


GOALS = (
    Goal(f"ternary auto, tuned, g{GROUP}", 4096, 1 << 20, 1.4),
    Goal(f"ternary A16, tuned, g{GROUP}", 4096, 1 << 20, 0.9),
    Goal(f"ternary auto, tuned, g{GROUP}", 1, 1, 3.0),
    Goal(f"ternary auto, tuned, g{GROUP}", 1, 1 << 20, 1.0),
)


@dataclass(frozen=True)
class Candidate:
    """A layer, the dense weight it stands for, and the error that its activations may add."""

    call: Callable[[], torch.Tensor]
    dense: torch.Tensor
    tolerance: float
    bias: torch.Tensor | None = None


@dataclass(frozen=True)
class Row:
    """One line of the result; a failed candidate has no timing."""

    shape: Shape
    name: str
    timing: Timing | None
    error: float
    note: str
    host_us: float = float("nan")


def ternary_candidates(
    x: torch.Tensor, bias: torch.Tensor, shape: Shape, group_size: int | None
) -> dict[str, Candidate]:
    """The public function, and the first plan of every path in every activation dtype."""
    generator = torch.Generator(device=x.device).manual_seed(shape.n)
    dense = torch.randn(shape.n, shape.k, generator=generator, device=x.device) * 0.02
    w = ternarize(dense, group_size=group_size)
    multiplier = None if w.multiplier is None else w.multiplier.view(torch.int8)
    weight = PackedWeight(w.packed, w.scale, multiplier, shape.k, w.spec.group_size)
    exact = w.dequantize(torch.float32)
    target = target_of(x.device.type, 0)
    assert target is not None
    scales = "row" if group_size is None else f"g{group_size}"

    def public(activation_dtype: str, hadamard: int = 0) -> Callable[[], torch.Tensor]:
        bias_dtype = None if bias is None else bias.dtype
        sizes, double = (shape.n, shape.k, w.spec.group_size), w.multiplier is not None
        layout = Layout(*sizes, w.scale.dtype, double, bias_dtype, activation_dtype, hadamard)
        call = prepare(x.shape, x.dtype, x.device, layout)
        assert call is not None
        return lambda: call(x, w.packed, w.scale, w.multiplier, bias)

    def planned(plan: Plan, activation_dtype: str) -> Callable[[], torch.Tensor]:
        return lambda: product.run(plan, x, weight, bias, activation_dtype, target)

    found = {f"ternary auto, tuned, {scales}": Candidate(public("auto"), exact, 0.06, bias)}
    if group_size is not None and shape.k >= ROTATION:
        found[f"ternary auto, rotated, {scales}"] = Candidate(
            public("auto", ROTATION), rotate(exact, ROTATION), 0.06, bias
        )
    for activation_dtype in ("none", *target.activation_dtypes):
        label = {"none": "A16", "int8": "int8", "float8_e4m3fn": "fp8"}[activation_dtype]
        tolerance = {"none": 0.01, "int8": 0.02, "float8_e4m3fn": 0.06}[activation_dtype]
        if x.device.type == "cpu" and activation_dtype == "float8_e4m3fn":
            tolerance = 0.1  # the interpreter's cast is wrong at powers of two
        found[f"ternary {label}, tuned, {scales}"] = Candidate(public(activation_dtype), exact, tolerance, bias)
        request = Request(shape.m, shape.n, shape.k, w.spec.group_size, weight.per_row, x.dtype, activation_dtype)
        paths = set()
        for plan in candidates(target, request, activation_dtype):
            if plan.path not in paths:
                name = f"ternary {label}, {plan.path}, {scales}"
                found[name] = Candidate(planned(plan, activation_dtype), exact, tolerance, bias)
            paths.add(plan.path)
    return found


def library_candidates(x: torch.Tensor, bias: torch.Tensor, shape: Shape) -> dict[str, Candidate]:
    """cuBLAS in bfloat16, and its 8-bit products on weights that are dense in 8 bits, with our quantization of x."""
    generator = torch.Generator(device=x.device).manual_seed(shape.n)
    dense = torch.randn(shape.n, shape.k, generator=generator, device=x.device) * 0.02
    half = dense.to(x.dtype)
    found = {BASELINE: Candidate(lambda: F.linear(x, half, bias), half.float(), 0.01, bias)}
    if x.device.type == "cuda" and torch.cuda.get_device_capability()[0] >= 9:
        scale8 = dense.abs().amax(dim=1, keepdim=True) / 448
        weight8 = (dense / scale8).to(torch.float8_e4m3fn)

        def scaled_mm() -> torch.Tensor:
            x8, x_scale = launch.quantize_activations(x, "float8_e4m3fn")
            return torch._scaled_mm(
                x8.view(torch.float8_e4m3fn),
                weight8.t(),
                scale_a=x_scale[:, None],
                scale_b=scale8.t(),
                bias=bias,
                out_dtype=x.dtype,
                use_fast_accum=True,
            )

        found["_scaled_mm fp8"] = Candidate(scaled_mm, weight8.float() * scale8, 0.06, bias)
    scale = dense.abs().amax(dim=1) / 127
    weight_int8 = (dense / scale[:, None]).round().to(torch.int8)

    def int_mm() -> torch.Tensor:
        x8, x_scale = launch.quantize_activations(x, "int8")
        y = torch.empty(shape.m, shape.n, dtype=x.dtype, device=x.device)
        launch.epilogue(torch._int_mm(x8, weight_int8.t()), x_scale, scale, bias, y)
        return y

    if shape.m > 16:
        found["_int_mm"] = Candidate(int_mm, weight_int8.float() * scale[:, None], 0.02, bias)
    return found


def peer_candidate(peer: Peer, x: torch.Tensor, shape: Shape) -> Candidate:
    dense = torch.randn(shape.n, shape.k, device=x.device) * 0.02
    model = nn.Linear(shape.k, shape.n, bias=False, device=x.device, dtype=x.dtype)
    model.weight.data.copy_(dense)
    layer = peer.make(model)
    # Their weights are rounded as they see fit: the product is only checked to be one (4 bits, or ternary by absmax).
    return Candidate(lambda: layer(x), dense, 2.0)


def relative_error(candidate: Candidate, x: torch.Tensor) -> float:
    """Relative RMS error against float32, the output's memory poisoned before."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        y = candidate.call()
    finally:
        torch.use_deterministic_algorithms(False)
    expected = x.float() @ candidate.dense.T
    if candidate.bias is not None:
        expected += candidate.bias.float()
    return float((y.float() - expected).norm() / expected.norm())


def benchmark(shape: Shape, stopwatch: Stopwatch, *, rounds: int) -> list[Row]:
    """All candidates of one shape; those that fail or miss their tolerance are named, not timed."""
    torch.compiler.reset()  # peers are compiled for each shape, and the compiler gives up after eight
    device = stopwatch.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16  # interpreted bfloat16 is wrong
    x = torch.randn(shape.m, shape.k, device=device, dtype=dtype)
    bias = torch.randn(shape.n, device=device, dtype=dtype)
    makers: list[tuple[str, Callable[[], dict[str, Candidate]]]] = [
        ("libraries", lambda: library_candidates(x, bias, shape)),
        ("ternary", lambda: ternary_candidates(x, bias, shape, GROUP)),
        ("ternary row", lambda: ternary_candidates(x, bias, shape, None)),
    ]
    for peer in installed():
        makers.append((peer.name, lambda peer=peer: {peer.name: peer_candidate(peer, x, shape)}))
    good: dict[str, Candidate] = {}
    errors: dict[str, float] = {}
    rows = []
    for label, make in makers:
        try:
            made = make()
        except Exception as error:
            rows.append(Row(shape, label, None, float("nan"), f"{type(error).__name__}: {error}".splitlines()[0]))
            continue
        for name, candidate in made.items():
            try:
                errors[name] = relative_error(candidate, x)
            except Exception as error:
                rows.append(Row(shape, name, None, float("nan"), f"{type(error).__name__}: {error}".splitlines()[0]))
                continue
            if errors[name] <= candidate.tolerance:
                good[name] = candidate
            else:
                rows.append(Row(shape, name, None, errors[name], f"wrong: error above {candidate.tolerance}"))
    timings = stopwatch.interleaved({name: candidate.call for name, candidate in good.items()}, rounds=rounds)
    host = {name: stopwatch.host_microseconds(good[name].call) for name in timings}
    return [Row(shape, name, timing, errors[name], "", host[name]) for name, timing in timings.items()] + rows


def print_table(rows: list[Row]) -> None:
    """Milliseconds, spread, TFLOP/s, speed against cuBLAS bf16, and error."""
    print(f"\n{'shape (M, N, K)':<28}{'layer':<34}{'ms':>9}{'±%':>6}{'TFLOP/s':>9}{'vs bf16':>9}", end="")
    print(f"{'host us':>9}{'error':>9}")
    previous = None
    for row in rows:
        shape = row.shape
        label = f"{shape.model} {shape.m}, {shape.n}, {shape.k}"
        print(f"{label if shape != previous else '':<28}{row.name:<34}", end="")
        previous = shape
        if row.timing is None:
            print(f"  {row.note}")
            continue
        seconds, base = row.timing.seconds, baseline_seconds(rows, shape)
        rate = 2 * shape.m * shape.n * shape.k / seconds / 1e12
        print(f"{seconds * 1e3:9.4f}{row.timing.spread * 100:6.1f}{rate:9.1f}{base / seconds:8.2f}x", end="")
        print(f"{row.host_us:9.1f}{row.error:9.4f}")


def baseline_seconds(rows: list[Row], shape: Shape) -> float:
    """Seconds of cuBLAS bf16 for a shape; NaN where it failed."""
    timings = (row.timing for row in rows if row.shape == shape and row.name == BASELINE)
    return next((timing.seconds for timing in timings if timing is not None), float("nan"))


def print_goals(rows: list[Row]) -> None:
    """The slowest shape of each goal."""
    print()
    for goal in GOALS:
        speeds = {
            row.shape: baseline_seconds(rows, row.shape) / row.timing.seconds
            for row in rows
            if row.timing is not None and row.name == goal.layer and goal.least_rows <= row.shape.m <= goal.most_rows
        }
        label = f"{goal.layer}, {goal.least_rows} rows" + ("" if goal.most_rows == goal.least_rows else " and more")
        if not speeds:
            print(f"goal {goal.speed:.2f}x  {label}: no such shape was measured")
            continue
        slowest = min(speeds, key=lambda shape: speeds[shape])
        print(f"goal {goal.speed:.2f}x  {label}: {speeds[slowest]:.2f}x at {slowest.m}, {slowest.n}, {slowest.k}")


HEADER = ("model", "m", "n", "k", "count", "layer", "seconds", "spread", "vs_bf16", "host_us", "error", "note")


def save(rows: list[Row], table: Table) -> None:
    """Adds the rows of one shape."""
    for row in rows:
        seconds = row.timing.seconds if row.timing else float("nan")
        spread = row.timing.spread if row.timing else float("nan")
        ratio = baseline_seconds(rows, row.shape) / seconds
        shape = row.shape
        numbers = (shape.m, shape.n, shape.k, shape.count)
        table.add(shape.model, *numbers, row.name, seconds, spread, ratio, row.host_us, row.error, row.note)


def plot(rows: list[Row], path: Path, device: torch.device) -> None:
    """Speed against cuBLAS bf16 by shape, one line per layer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys(row.shape for row in rows))
    names = list(dict.fromkeys(row.name for row in rows if row.timing is not None))
    figure, axes = plt.subplots(figsize=(12, 6))
    for name in names:
        timings = {row.shape: row.timing for row in rows if row.name == name and row.timing is not None}
        points = [baseline_seconds(rows, s) / timings[s].seconds if s in timings else float("nan") for s in shapes]
        axes.plot(range(len(shapes)), points, marker="o", label=name)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(shapes)), [f"{s.m}, {s.n}, {s.k}" for s in shapes], rotation=60, fontsize=7)
    axes.set_ylabel("speed against cuBLAS bf16")
    axes.set_title(device_name(device))
    axes.legend(fontsize=6, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on the CPU under Triton's interpreter")
    parser.add_argument("--minutes", type=float, default=7.5, help="no shape is begun later than this")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    device = torch.device("cpu" if options.dry_run else "cuda")
    if target_of(device.type, 0) is None:
        parser.error("--dry-run needs TRITON_INTERPRET=1; without it, a GPU is needed.")
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.manual_seed(0)
    start, slowest = time.monotonic(), 0.0
    stopwatch, rows = Stopwatch(device), []
    path = options.output / f"linear_{device_name(device).lower().replace(' ', '-')}.csv"
    table = Table(path, HEADER, device)
    shapes = DRY_SHAPES if options.dry_run else SHAPES
    with torch.no_grad():
        for index, shape in enumerate(shapes):
            elapsed = time.monotonic() - start
            if elapsed + slowest > 60 * options.minutes:
                print(f"Time is up: {len(shapes) - index} of {len(shapes)} shapes left out, from {shape}.")
                break
            try:
                measured = benchmark(shape, stopwatch, rounds=options.rounds)
            except Exception as error:  # one shape less; the others are as good as before
                message = f"{type(error).__name__}: {error}".splitlines()[0]
                measured = [Row(shape, "all", None, float("nan"), message)]
            save(measured, table)
            rows += measured
            slowest = max(slowest, time.monotonic() - start - elapsed)
            print(f"{shape}: done after {time.monotonic() - start:.0f} s", flush=True)
    print_table(rows)
    print_goals(rows)
    if options.dry_run:
        print("\nDry run: the harness works; the times are the interpreter's and mean nothing.")
    plot(rows, path.with_suffix(".png"), device)
    print(f"\nWritten to {path}")


if __name__ == "__main__":
    main()
