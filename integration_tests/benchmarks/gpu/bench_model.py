# SPDX-License-Identifier: Apache-2.0
"""A denoising step of full-size FLUX.1-dev and SANA-1.6B transformers, ternary against bfloat16.

    python integration_tests/benchmarks/gpu/bench_model.py              # at most eight minutes
    python integration_tests/benchmarks/gpu/bench_model.py --dry-run    # no GPU: models of one block

Weights are random and made on the device (nothing is downloaded, no bfloat16 model touches a disk): time and memory
do not depend on them, quality is measured elsewhere. A step is one call of the transformer at 1024 x 1024, batch 1:
eager, as one CUDA graph, compiled block by block, and with fused projections; the two models are interleaved. Memory
is that of the weights plus the peak of a step over what was allocated before it. Files come last: the ternary model is
saved and loaded, in a memory-backed folder where there is one, and bfloat16 after it if time is left.
results/model_<device>.csv has a figure as soon as it is known, the most wanted first; what fails is a row, too, and
the others go on.
"""

import argparse
import contextlib
import copy
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel, ModelMixin, SanaTransformer2DModel
from gpu_timing import Stopwatch, synchronize
from report import Table, device_name

from diffusers_ternary import TernaryConfig, quantize


sys.path.insert(0, str(Path(__file__).parents[3]))
from integration_tests.support import denoisers


RESULTS = Path(__file__).parent / "results"
HEADER = ("model", "weights", "mode", "quantity", "value", "unit", "at_seconds")
FOLDER_BYTES = 4e9  # free memory to leave in a memory-backed folder
Steps = Mapping[str, Callable[[], torch.Tensor]]


@dataclass(frozen=True)
class Case:
    """A model: how to build it, and the inputs of one step."""

    name: str
    build: Callable[[], ModelMixin]
    inputs: Callable[[ModelMixin, torch.device], dict[str, torch.Tensor]]


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
    Case("FLUX.1-dev", lambda: FluxTransformer2DModel(guidance_embeds=True), flux_inputs),
    Case("SANA-1.6B", SanaTransformer2DModel, sana_inputs),
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


def weight_bytes(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def compile_blocks(model: ModelMixin, device: torch.device) -> None:
    """Compiles each block, as diffusers' `compile_repeated_blocks` does for the classes that name theirs."""
    backend = "inductor" if device.type == "cuda" else "aot_eager"  # a dry run only traces
    for child in model.children():
        if isinstance(child, torch.nn.ModuleList):
            for block in child:
                block.compile(fullgraph=True, backend=backend)


class Session:
    """The figures of one model, with a limit of time.

    Args:
        case ([`Case`]): the model.
        table ([`Table`]): where figures go.
        stopwatch ([`Stopwatch`]): on the device.
        seconds (`float`): no stage is begun that would take longer than what is left.
        rounds (`int`): of interleaved timings.
    """

    def __init__(self, case: Case, table: Table, stopwatch: Stopwatch, seconds: float, rounds: int) -> None:
        self.case, self.table, self.stopwatch, self.rounds = case, table, stopwatch, rounds
        self.device = stopwatch.device
        self._start, self._seconds = time.monotonic(), seconds
        self.failed = 0

    def say(self, weights: str, mode: str, quantity: str, value: object, unit: str) -> None:
        """Writes a figure."""
        at = round(time.monotonic() - self._start, 1)
        self.table.add(self.case.name, weights, mode, quantity, value, unit, at)
        print(f"{at:7.1f} s  {self.case.name:<16}{weights:<9}{mode:<18}{quantity:<24}{value} {unit}", flush=True)

    @contextlib.contextmanager
    def stage(self, name: str, needs: float) -> Iterator[bool]:
        """Whether there is time; an error inside is a row and ends the stage only."""
        left = self._seconds - (time.monotonic() - self._start)
        if left < needs:
            self.say("", name, "left out", round(left, 1), f"s left, {needs} wanted")
        try:
            yield left >= needs
        except Exception as error:
            self.failed += 1
            self.say("", name, "error", f"{type(error).__name__}: {error}".splitlines()[0][:300], "")

    def timed(self, weights: str, mode: str, quantity: str, function: Callable[[], object]) -> object:
        """Says how long something takes once."""
        synchronize(self.device)
        begin = time.monotonic()
        result = function()
        synchronize(self.device)
        self.say(weights, mode, quantity, round(time.monotonic() - begin, 3), "s")
        return result

    def speed(self, mode: str, steps: Steps, base: float | None = None) -> float:
        """Times steps in turn; returns the seconds of bfloat16."""
        timings = self.stopwatch.interleaved(steps, rounds=self.rounds, samples=5)
        base = timings["bf16"].seconds if base is None else base
        for weights, timing in timings.items():
            self.say(weights, mode, "step", round(timing.seconds * 1e3, 3), f"ms, spread {timing.spread * 100:.1f} %")
            self.say(weights, mode, "speed", round(base / timing.seconds, 3), "x bf16")
        return base


def error(session: Session, steps: Steps) -> None:
    y, z = (step().float() for step in steps.values())
    difference = float((y - z).norm() / y.norm())
    session.say("ternary", "eager", "difference", round(difference, 4), "of bf16's norm; random weights")
    if not bool(torch.isfinite(z).all()):
        raise ArithmeticError("the ternary model's output is not finite")


def memory(session: Session, models: Mapping[str, ModelMixin], steps: Steps) -> None:
    peaks = {}
    for weights, step in steps.items():
        own = weight_bytes(models[weights])
        session.say(weights, "eager", "weights", round(own / 1e9, 4), "GB")
        if session.device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step()
            torch.cuda.synchronize()
            own += torch.cuda.max_memory_allocated() - before
        peaks[weights] = own
        session.say(weights, "eager", "peak of a step", round(own / 1e9, 4), "GB")
    session.say("ternary", "eager", "peak", round(peaks["bf16"] / peaks["ternary"], 3), "x below bf16")


def host_time(session: Session, steps: Steps) -> None:
    for weights, step in steps.items():
        microseconds = session.stopwatch.host_microseconds(step, calls=2)
        session.say(weights, "eager", "host", round(microseconds / 1e3, 3), "ms to enqueue a step")


def graphs(session: Session, steps: Steps) -> None:
    """The step as one CUDA graph: the device's time without the host's."""
    replays = {}
    for weights, step in steps.items():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        replays[weights] = graph.replay
    session.speed("CUDA graph", replays)


def files(session: Session, weights: str, model: ModelMixin) -> None:
    """Saves and loads a model, in memory where a folder is backed by it."""
    wanted = weight_bytes(model) + FOLDER_BYTES
    room = {p: shutil.disk_usage(p).free for p in ("/dev/shm", tempfile.gettempdir()) if Path(p).is_dir()}
    parent = next((path for path, free in room.items() if free > wanted), tempfile.gettempdir())
    folder = Path(tempfile.mkdtemp(prefix="ternary-bench-", dir=parent))
    try:
        session.timed(weights, "files", f"save to {parent}", lambda: model.save_pretrained(folder))
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        session.say(weights, "files", "size", round(size / 1e9, 4), "GB")
        options = {"torch_dtype": torch.bfloat16, "device_map": str(session.device)}
        session.timed(weights, "files", "load", lambda: type(model).from_pretrained(folder, **options))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def compiled(session: Session, models: Mapping[str, ModelMixin], steps: Steps) -> None:
    for weights, model in models.items():
        compile_blocks(model, session.device)
        session.timed(weights, "compiled", "first step", steps[weights])
    session.speed("compiled", steps)


def benchmark(session: Session) -> None:
    """All stages of a model, in order of value."""
    case, device = session.case, session.device
    bf16 = build(case, device)
    ternary = copy.deepcopy(bf16)
    session.timed("ternary", "make", "quantize on the device", lambda: quantize(ternary, TernaryConfig()))
    inputs = case.inputs(bf16, device)
    models = {"bf16": bf16, "ternary": ternary}

    def step_of(model: ModelMixin) -> Callable[[], torch.Tensor]:
        return lambda: model(**inputs, return_dict=False)[0]

    steps = {weights: step_of(model) for weights, model in models.items()}
    base: float | None = None
    with session.stage("first step", 0):
        session.timed("ternary", "eager", "first step, with tuning", steps["ternary"])
    with session.stage("error", 2) as go:
        if go:
            error(session, steps)
    with session.stage("memory", 2) as go:
        if go:
            memory(session, models, steps)
    with session.stage("eager", 5) as go:
        if go:
            base = session.speed("eager", steps)
    with session.stage("host", 2) as go:
        if go:
            host_time(session, steps)
    with session.stage("CUDA graph", 8) as go:
        if go and device.type == "cuda":
            graphs(session, steps)
    # Fused projections change the model, so they are measured on a copy where there is memory and time.
    with session.stage("fused qkv", 15) as go:
        if go and base is not None and hasattr(bf16, "fuse_qkv_projections"):
            fused = copy.deepcopy(ternary)
            fused.fuse_qkv_projections()
            session.speed("eager, fused qkv", {"ternary": step_of(fused)}, base)
            del fused
    with session.stage("compiled", 40) as go:
        if go:
            compiled(session, models, steps)
    # The packed model is what people load; bfloat16, eight times as large, is the baseline if there is time.
    for weights, needs in (("ternary", 15), ("bf16", 45)):
        with session.stage(f"files, {weights}", needs) as go:
            if go:
                files(session, weights, models[weights])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="models of one block, on the CPU")
    parser.add_argument("--model", choices=("flux", "sana", "all"), default="all")
    parser.add_argument("--minutes", type=float, default=7.5, help="for all models together")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("no GPU; --dry-run checks the harness without one.")
    device = torch.device("cpu" if options.dry_run else "cuda")
    torch.manual_seed(0)
    cases = [c for c in (DRY if options.dry_run else FULL) if options.model in ("all", c.name[:4].lower())]
    suffix = "" if options.model == "all" else f"_{options.model}"
    path = options.output / f"model{suffix}_{device_name(device).lower().replace(' ', '-')}.csv"
    table, stopwatch, failed = Table(path, HEADER, device), Stopwatch(device), 0
    for case in cases:
        session = Session(case, table, stopwatch, 60 * options.minutes / len(cases), options.rounds)
        with torch.no_grad(), session.stage("all", 0):
            benchmark(session)
        failed += session.failed
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if options.dry_run:
        print("\nDry run: the harness works; the figures are a CPU's and mean nothing.")
    print(f"{failed} stages failed." if failed else "No stage failed.")
    print(f"\nWritten to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
