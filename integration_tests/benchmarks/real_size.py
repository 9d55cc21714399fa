# SPDX-License-Identifier: Apache-2.0
"""Models of real size, from synthetic checkpoints: quantization, file size, loading, and a denoising step.

    OMP_NUM_THREADS=2 python integration_tests/benchmarks/real_size.py sana-1.6b flux.1-dev --folder /big/disk
    OMP_NUM_THREADS=2 python integration_tests/benchmarks/real_size.py sana-1.6b --steps forward --avx2

The checkpoints have the published configurations, shapes, dtype and shard sizes, and random weights: normal, with
standard deviation 1/sqrt(K), cut from one block of 16 M values at an offset of each tensor's own. Every step runs in
a process of its own, with peak memory from the kernel's accounting. Results go to results/real_size.csv, one line
per quantity, beside what was asked for. FLUX.1-dev needs 24 GB of disk for the original and 3 GB for the packed model.
"""

import argparse
import csv
import dataclasses
import functools
import json
import platform
import shutil
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from cpu_timing import limited_to_avx2, processor, restart_limited_to_avx2
from diffusers import FluxTransformer2DModel, SanaTransformer2DModel
from huggingface_hub import split_torch_state_dict_into_shards
from process_memory import drop_from_page_cache, measure_peak, status
from safetensors.torch import save_file

import diffusers_ternary
from diffusers_ternary import TernaryConfig
from diffusers_ternary.backend import bits_per_weight, packed_layers
from diffusers_ternary.kernels.cpu import native
from diffusers_ternary.kernels.cpu import prepared as cpu_call
from diffusers_ternary.kernels.cpu import products as cpu_linear


RESULTS = Path(__file__).parent / "results" / "real_size.csv"
WEIGHTS = "diffusion_pytorch_model.safetensors"
GB = 10**9
SLACK = 1.5 * GB  # what quantization may use beside the largest shard and the packed model
BLOCK = 1 << 24  # random values that all tensors are cut from
ROUNDS = {"float32": 3, "bfloat16": 2, "packed": 3}
EMBEDDERS_INT8 = {"time_embed.*": "int8", "caption_projection.*": "int8", "proj_out": "int8"}


@dataclasses.dataclass(frozen=True)
class Model:
    """A published model.

    Args:
        model_class (`type`): its class.
        config (`dict`): what differs from the class's defaults.
        shard_bytes (`int`): largest file of the original.
        settings (`dict`): name → quantization config; the first one is the default.
        largest (`dict`): name of a setting → most bytes its files may have.
        ratio (`dict`): name of a setting → what is asked of original / packed.
        forward (`bool`): whether a denoising step is measured.
    """

    model_class: type
    config: dict[str, Any]
    shard_bytes: int
    settings: dict[str, TernaryConfig]
    largest: dict[str, float]
    ratio: dict[str, str]
    forward: bool


MODELS = {
    "flux.1-dev": Model(
        FluxTransformer2DModel,
        {"guidance_embeds": True},
        10 * GB,
        {"default": TernaryConfig()},
        {"default": 2.75 * GB},
        {"default": ">= 8.6"},
        forward=False,
    ),
    "sana-1.6b": Model(
        SanaTransformer2DModel,
        {},
        10 * GB,
        {
            "default": TernaryConfig(),
            "int8 embedders, group size 256": TernaryConfig(group_size=256, overrides=EMBEDDERS_INT8),
        },
        {"default": 0.440 * GB, "int8 embedders, group size 256": 0.374 * GB},
        {},
        forward=True,
    ),
}


@dataclasses.dataclass(frozen=True)
class Figure:
    """One line of the table: a quantity, and what was asked for (`"<= 2.75"`), if anything."""

    quantity: str
    value: float
    unit: str
    asked: str = ""

    @property
    def met(self) -> str:
        if not self.asked:
            return ""
        relation, bound = self.asked.split()
        return "yes" if (self.value <= float(bound) if relation == "<=" else self.value >= float(bound)) else "no"


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def write(model: Model, folder: Path) -> None:
    """Writes the float checkpoint shard by shard; never holds more than one."""
    with torch.device("meta"):
        shape = model.model_class(**model.config).to(torch.bfloat16)
    shape.save_config(folder)
    state = shape.state_dict()
    split = split_torch_state_dict_into_shards(
        state, max_shard_size=model.shard_bytes, filename_pattern=WEIGHTS.replace(".", "{suffix}.")
    )
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for file, names in split.filename_to_tensors.items():
        save_file({name: random_weight(block, name, state[name].shape) for name in names}, folder / file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def random_weight(block: torch.Tensor, name: str, shape: torch.Size) -> torch.Tensor:
    if len(shape) == 1:  # norms, biases, tables: values do not matter here, only that products stay finite
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=block.dtype)
    offset = zlib.crc32(name.encode()) % BLOCK  # an offset of each tensor's own
    values = block.roll(offset).repeat(-(-shape.numel() // BLOCK))[: shape.numel()].view(shape)
    return values * shape[1:].numel() ** -0.5


# --- steps; each is a process of its own --------------------------------------------------------------------------


def quantize(model: Model, setting: str, original: Path, packed: Path) -> list[Figure]:
    largest_shard = max(file.stat().st_size for file in original.glob("*.safetensors"))
    drop_from_page_cache(original)
    with measure_peak() as peak:
        start, cpu = time.perf_counter(), time.process_time()
        quantized = model.model_class.from_pretrained(
            original, quantization_config=model.settings[setting], torch_dtype=torch.bfloat16
        )
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    in_memory = sum(p.numel() * p.element_size() for p in quantized.parameters())
    specs = {name: layer.spec for name, layer in packed_layers(quantized).items()}
    converted = sum(spec.weights for spec in specs.values())
    kept = sum(p.numel() for name, p in quantized.named_parameters() if name.rpartition(".")[0] not in specs)
    bound = (largest_shard + in_memory + SLACK) / GB
    with measure_peak() as saving:
        start = time.perf_counter()
        quantized.save_pretrained(packed)
        save_seconds = time.perf_counter() - start
    stored, limit = size(packed), model.largest[setting] / GB
    return [
        Figure("quantization, wall", seconds, "s"),
        Figure("quantization, CPU", cpu_seconds, "s"),
        Figure("quantization throughput", (kept + converted) / seconds / 1e6, "M weights/s"),
        Figure("largest shard", largest_shard / GB, "GB"),
        Figure("peak resident, quantization", peak.resident / GB, "GB", f"<= {bound:.2f}"),
        Figure("peak allocated, quantization", peak.anonymous / GB, "GB"),
        Figure("peak mapped, quantization", peak.mapped / GB, "GB"),
        Figure("share of converted weights", 100 * converted / (kept + converted), "%"),
        Figure("bits per converted weight", bits_per_weight(specs), "bits"),
        Figure("model in memory", in_memory / GB, "GB"),
        Figure("saving, wall", save_seconds, "s"),
        Figure("peak resident, saving", saving.resident / GB, "GB"),
        Figure("original files", size(original) / GB, "GB"),
        Figure("packed files", stored / GB, "GB", f"<= {limit:g}"),
        Figure("original / packed", size(original) / stored, "x"),
    ]


def load(model: Model, setting: str, original: Path, packed: Path) -> list[Figure]:
    figures = []
    for cache in ("cold", "warm"):
        if cache == "cold":
            drop_from_page_cache(packed)
        start = time.perf_counter()
        for file in packed.glob("*.safetensors"):
            with open(file, "rb", buffering=0) as handle:
                while handle.read(1 << 24):
                    pass
        figures.append(Figure(f"reading the file, {cache} cache", time.perf_counter() - start, "s"))
    drop_from_page_cache(packed)
    with measure_peak() as peak:
        start = time.perf_counter()
        loaded = model.model_class.from_pretrained(packed, torch_dtype=torch.bfloat16)
        seconds = time.perf_counter() - start
    resident = status("VmRSS") - peak.before
    stored = size(packed)
    in_memory = sum(p.numel() * p.element_size() for p in loaded.parameters())
    del loaded
    start, cpu_start = time.perf_counter(), time.process_time()
    model.model_class.from_pretrained(packed, torch_dtype=torch.bfloat16)
    warm, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    return [
        *figures,
        Figure("loading, cold cache", seconds, "s"),
        Figure("loading, warm cache", warm, "s"),
        Figure("loading, CPU", cpu, "s"),
        Figure("loading speed per CPU second", stored / cpu / GB, "GB/s"),
        Figure("resident after loading, above imports", resident / GB, "GB", f"<= {1.2 * stored / GB:.3f}"),
        Figure("parameters in memory", in_memory / GB, "GB"),
        Figure("peak resident, loading, above imports", (peak.resident - peak.before) / GB, "GB"),
        Figure("peak allocated, loading", peak.anonymous / GB, "GB"),
    ]


@torch.no_grad()
def forward(model: Model, variant: str, original: Path, packed: Path) -> list[Figure]:
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "packed": torch.float32}[variant]
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 32, 32, 32, generator=generator).to(dtype),  # 1024 px: 32 x 32 latents
        "encoder_hidden_states": torch.randn(1, 300, 2304, generator=generator).to(dtype),
        "timestep": torch.tensor([500]),
    }
    folder = packed if variant == "packed" else original
    with measure_peak() as peak:
        denoiser = model.model_class.from_pretrained(folder, torch_dtype=dtype)
        wall = cpu = float("inf")
        for _ in range(ROUNDS[variant]):
            start, cpu_start = time.perf_counter(), time.process_time()
            output = denoiser(**inputs, return_dict=False)[0]
            wall, cpu = min(wall, time.perf_counter() - start), min(cpu, time.process_time() - cpu_start)
    if not torch.isfinite(output).all():
        raise SystemExit(f"{variant}: the output is not finite; no figure.")
    return [
        Figure(f"denoising step, {variant}, wall", wall, "s"),
        Figure(f"denoising step, {variant}, CPU", cpu, "s"),
        Figure(f"peak resident, denoising, {variant}", peak.resident / GB, "GB"),
        Figure(f"peak above imports, denoising, {variant}", (peak.resident - peak.before) / GB, "GB"),
    ]


STEPS: dict[str, Callable[[Model, str, Path, Path], list[Figure]]] = {
    "quantize": quantize,
    "load": load,
    "forward": forward,
}


# --- all of them --------------------------------------------------------------------------------------------------


def in_process(step: str, name: str, setting: str, original: Path, packed: Path) -> list[Figure]:
    arguments = [sys.executable, __file__, name, "--one", step, setting, str(original), str(packed)]
    result = subprocess.run(arguments, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        raise SystemExit(f"{name}: the step {step} failed.")
    return [Figure(**figure) for figure in json.loads(result.stdout.splitlines()[-1])]


def compare(figures: list[Figure]) -> list[Figure]:
    """Ratios of the denoising steps."""
    value = {figure.quantity: figure.value for figure in figures}
    ratios = []
    for variant, asked in (("float32", ">= 2"), ("bfloat16", ">= 6")):
        for clock in ("wall", "CPU"):
            times = [value[f"denoising step, {kind}, {clock}"] for kind in (variant, "packed")]
            ratio = times[0] / times[1]
            ratios.append(Figure(f"faster than {variant}, {clock}", ratio, "x", asked if clock == "wall" else ""))
    for quantity, asked in (("peak resident", ""), ("peak above imports", ">= 5")):
        peaks = [value[f"{quantity}, denoising, {kind}"] for kind in ("bfloat16", "packed")]
        ratios.append(Figure(f"bfloat16 / packed, {quantity}", peaks[0] / peaks[1], "x", asked))
    return ratios


def measure(name: str, root: Path, steps: list[str]) -> list[dict[str, Any]]:
    model = MODELS[name]
    original = root / name
    with torch.device("meta"):
        needed = 1.2 * sum(2 * p.numel() for p in model.model_class(**model.config).parameters())
    if not original.exists():
        free = shutil.disk_usage(root).free
        if free < needed:
            print(f"{name} skipped: {root} has {free / GB:.0f} GB free, and {needed / GB:.0f} are needed.")
            return []
        original.mkdir()
        write(model, original)
    table = []

    def report(setting: str, figures: list[Figure]) -> None:
        for figure in figures:
            print(
                f"{name:<11} {setting:<31} {figure.quantity:<45} {figure.value:>9.3f} {figure.unit:<11} "
                f"{figure.asked:<10} {figure.met}",
                flush=True,
            )
            table.append(
                {
                    "model": name,
                    "setting": setting,
                    "quantity": figure.quantity,
                    "value": f"{figure.value:.4g}",
                    "unit": figure.unit,
                    "asked": figure.asked,
                    "met": figure.met,
                }
            )

    for setting in model.settings:
        packed = root / f"{name} packed {setting}".replace(" ", "-").replace(",", "")
        for step in ("quantize", "load"):
            if step in steps:
                report(setting, in_process(step, name, setting, original, packed))
    if "forward" in steps and model.forward:
        packed = root / f"{name} packed default".replace(" ", "-")
        figures = [f for variant in ROUNDS for f in in_process("forward", name, variant, original, packed)]
        report("default", [*figures, *compare(figures)])
    return table


def machine() -> dict[str, str]:
    return {
        "processor": processor(),
        "threads": str(torch.get_num_threads()),
        "torch instructions": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "diffusers-ternary": diffusers_ternary.__version__,
    }


def merge(table: list[dict[str, Any]]) -> None:
    """Writes the lines of this run over those of earlier ones with the same subject, and keeps the others."""

    def subject(line: dict[str, Any]) -> tuple[str, ...]:
        return tuple(line[column] for column in ("model", "setting", "quantity", "torch instructions"))

    merged = {}
    if RESULTS.exists():
        with open(RESULTS, newline="") as file:
            merged = {subject(line): line for line in csv.DictReader(file)}
    merged.update({subject(line): line for line in table})
    with open(RESULTS, "w", newline="") as file:
        writer = csv.DictWriter(file, next(iter(merged.values())))
        writer.writeheader()
        writer.writerows(merged.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=MODELS)
    parser.add_argument("--folder", type=Path, default=Path("real_size"), help="where the checkpoints go")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--avx2", action="store_true", help="limit torch, MKL, oneDNN and the kernel to AVX2")
    parser.add_argument("--delete", action="store_true", help="delete each model's checkpoints when it is done")
    parser.add_argument("--one", nargs=4, metavar=("STEP", "SETTING", "ORIGINAL", "PACKED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.avx2:
        restart_limited_to_avx2()
    warnings.filterwarnings("ignore")
    diffusers.utils.logging.disable_progress_bar()
    if options.one:
        step, setting, original, packed = options.one
        if limited_to_avx2():
            cpu_linear.load = cpu_call.load = functools.partial(native.load, "avx2")
        figures = STEPS[step](MODELS[options.models[0]], setting, Path(original), Path(packed))
        print(json.dumps([dataclasses.asdict(figure) for figure in figures]))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    print(machine())
    for name in options.models:
        if table := measure(name, options.folder, options.steps):
            merge([{**line, **machine()} for line in table])
        if options.delete:
            for folder in options.folder.glob(f"{name}*"):
                shutil.rmtree(folder)


if __name__ == "__main__":
    main()
