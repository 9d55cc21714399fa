# SPDX-License-Identifier: Apache-2.0
"""A denoising step of full-size FLUX.1-dev and SANA-1.6B transformers, ternary against bfloat16.

    python integration_tests/benchmarks/gpu/bench_model.py              # at most eight minutes
    python integration_tests/benchmarks/gpu/bench_model.py --dry-run    # no GPU: models of one block

Weights are random (nothing is downloaded): time and memory do not depend on them, quality is measured elsewhere.
A step is one call of the transformer at 1024 x 1024, batch 1, eager and compiled block by block. The two models are
interleaved. Memory is that of the weights plus the peak of a step over what was allocated before it. Load time is
`from_pretrained` from a local folder to the device. The models are written below the temporary folder, 27 GB for
FLUX.1-dev (`TMPDIR` names another). The table comes last; results/model_<device>.csv holds the same.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel, ModelMixin, SanaTransformer2DModel
from gpu_timing import Stopwatch
from report import device_name, write_csv

from diffusers_ternary import TernaryConfig, quantize


sys.path.insert(0, str(Path(__file__).parents[2]))
from support import denoisers


RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Case:
    """A model: how to build it, and the inputs of one step."""

    name: str
    build: Callable[[], ModelMixin]
    inputs: Callable[[ModelMixin, torch.device], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Measured:
    """What a benchmark line says of one model in one mode."""

    model: str
    weights: str
    mode: str
    seconds: float
    spread: float
    peak_bytes: int
    weight_bytes: int
    load_seconds: float


def flux_inputs(model: ModelMixin, device: torch.device) -> dict[str, torch.Tensor]:
    config = model.config
    tokens, text = (4096, 512) if device.type == "cuda" else (16, 4)
    random = {"device": device, "dtype": torch.bfloat16}
    return {
        "hidden_states": torch.randn(1, tokens, config.in_channels, **random),
        "encoder_hidden_states": torch.randn(1, text, config.joint_attention_dim, **random),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, **random),
        "timestep": torch.full((1,), 0.5, **random),
        "guidance": torch.full((1,), 3.5, device=device),
        "img_ids": torch.zeros(tokens, 3, device=device),
        "txt_ids": torch.zeros(text, 3, device=device),
    }


def sana_inputs(model: ModelMixin, device: torch.device) -> dict[str, torch.Tensor]:
    config = model.config
    side, text = (32, 300) if device.type == "cuda" else (8, 4)
    random = {"device": device, "dtype": torch.bfloat16}
    return {
        "hidden_states": torch.randn(1, config.in_channels, side, side, **random),
        "encoder_hidden_states": torch.randn(1, text, config.caption_channels, **random),
        "timestep": torch.full((1,), 500.0, device=device),
    }


FULL = (
    Case("SANA-1.6B", SanaTransformer2DModel, sana_inputs),
    Case("FLUX.1-dev", lambda: FluxTransformer2DModel(guidance_embeds=True), flux_inputs),
)
DRY = (Case("SANA, one block", denoisers.sana, sana_inputs), Case("FLUX, one block", denoisers.flux, flux_inputs))


def build(case: Case, device: torch.device) -> ModelMixin:
    """The model with random bfloat16 weights, made on the device."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return case.build().eval()
    finally:
        torch.set_default_dtype(torch.float32)


def load(model_class: type[ModelMixin], folder: Path, device: torch.device) -> tuple[ModelMixin, float]:
    """Loads a folder to the device; returns the model and the seconds."""
    synchronize(device)
    start = time.perf_counter()
    model = model_class.from_pretrained(folder, torch_dtype=torch.bfloat16, device_map=str(device))
    synchronize(device)
    return model.eval(), time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def weight_bytes(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def peak_bytes(model: ModelMixin, step: Callable[[], object], device: torch.device) -> int:
    """Bytes of the weights, plus the peak of a step over what was allocated before."""
    if device.type != "cuda":
        return weight_bytes(model)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return weight_bytes(model) + torch.cuda.max_memory_allocated() - before


def save_both(case: Case, folder: Path, device: torch.device) -> type[ModelMixin]:
    """Writes the model in bfloat16 and ternary below `folder`; returns its class."""
    model = build(case, device)
    model.save_pretrained(folder / "bf16")
    quantize(model, TernaryConfig()).save_pretrained(folder / "ternary")
    return type(model)


def compile_blocks(model: ModelMixin, device: torch.device) -> None:
    """Compiles each block, as diffusers' `compile_repeated_blocks` does for the classes that name theirs."""
    backend = "inductor" if device.type == "cuda" else "aot_eager"  # a dry run only traces
    for child in model.children():
        if isinstance(child, torch.nn.ModuleList):
            for block in child:
                block.compile(fullgraph=True, backend=backend)


def benchmark(case: Case, stopwatch: Stopwatch, folder: Path, *, rounds: int) -> list[Measured]:
    """Both models of a case, eager, then compiled."""
    device = stopwatch.device
    model_class = save_both(case, folder, device)
    models, seconds = {}, {}
    for weights in ("bf16", "ternary"):
        models[weights], seconds[weights] = load(model_class, folder / weights, device)
    inputs = case.inputs(models["bf16"], device)

    def step_of(model: ModelMixin) -> Callable[[], object]:
        return lambda: model(**inputs, return_dict=False)[0]

    steps = {weights: step_of(model) for weights, model in models.items()}
    measured = []
    for mode in ("eager", "compiled"):
        if mode == "compiled":
            for model in models.values():
                compile_blocks(model, device)
        timings = stopwatch.interleaved(steps, rounds=rounds, samples=5)
        for weights, model in models.items():
            measured.append(
                Measured(
                    case.name,
                    weights,
                    mode,
                    timings[weights].seconds,
                    timings[weights].spread,
                    peak_bytes(model, steps[weights], device),
                    weight_bytes(model),
                    seconds[weights],
                )
            )
    return measured


def print_table(rows: list[Measured]) -> None:
    """Each line against bfloat16 in the same mode."""
    print(f"\n{'model':<18}{'mode':<10}{'weights':<9}{'step ms':>10}{'±%':>6}{'speed':>8}", end="")
    print(f"{'weights GB':>12}{'peak GB':>9}{'memory':>9}{'load s':>8}")
    for row in rows:
        base = next(r for r in rows if (r.model, r.mode, r.weights) == (row.model, row.mode, "bf16"))
        print(f"{row.model:<18}{row.mode:<10}{row.weights:<9}{row.seconds * 1e3:10.2f}{row.spread * 100:6.1f}", end="")
        print(f"{base.seconds / row.seconds:7.2f}x{row.weight_bytes / 1e9:12.3f}{row.peak_bytes / 1e9:9.3f}", end="")
        print(f"{base.peak_bytes / row.peak_bytes:8.2f}x{row.load_seconds:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="models of one block, on the CPU")
    parser.add_argument("--minutes", type=float, default=7.5, help="no model is begun later than a third of this")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("no GPU; --dry-run checks the harness without one.")
    device = torch.device("cpu" if options.dry_run else "cuda")
    torch.manual_seed(0)
    start = time.monotonic()
    stopwatch, rows = Stopwatch(device), []
    for case in DRY if options.dry_run else FULL:
        if time.monotonic() - start > 60 * options.minutes / 3:
            print(f"Time is up before {case.name}.")
            break
        folder = Path(tempfile.mkdtemp(prefix="ternary-bench-"))
        try:
            with torch.no_grad():
                rows += benchmark(case, stopwatch, folder, rounds=options.rounds)
        finally:
            shutil.rmtree(folder)
        print(f"{case.name}: done after {time.monotonic() - start:.0f} s", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    lines = [tuple(vars(row).values()) for row in rows]
    header = ("model", "weights", "mode", "seconds", "spread", "peak_bytes", "weight_bytes", "load_seconds")
    path = options.output / f"model_{device_name(device).lower().replace(' ', '-')}.csv"
    write_csv(path, header, lines, device)
    print_table(rows)
    if options.dry_run:
        print("\nDry run: the harness works; the figures are a CPU's and mean nothing.")
    print(f"\nWritten to {path}")


if __name__ == "__main__":
    main()
