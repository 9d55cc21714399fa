# SPDX-License-Identifier: Apache-2.0
"""What each way to ternary weights leaves of the embedded pipeline, on prompts that nothing was trained on.

    python integration_tests/benchmarks/quality.py                     # every method, three seeds
    python integration_tests/benchmarks/quality.py --seeds 1 --images 64 --methods twn calibrated

All linear layers inside the blocks are ternary, modulation included. A seed decides the calibration prompts, their
noise, and the images that are compared. The judge counts attributes; PSNR and velocity error are against the teacher's
images and denoiser outputs. Results go to results/quality.csv, contact sheets to results/quality_seed<n>.png.
"""

import argparse
import csv
import dataclasses
import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from diffusers_ternary import TernaryConfig, quantize
from diffusers_ternary.calibration import CalibrationConfig, SolverConfig, calibrate
from diffusers_ternary.demo.grammar import held_out_prompts, training_prompts
from diffusers_ternary.demo.pipeline import DEMO_CALL, demo_pipeline
from diffusers_ternary.demo.run import judge_scorer
from diffusers_ternary.demo.variants import stored_size
from diffusers_ternary.evaluation import Sampling, compare, contact_sheet, observe_teacher


RESULTS = Path(__file__).parent / "results"
BATCH = 32
VELOCITY_PROMPTS = 64


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to quantize; without `calibration` it is rounding."""

    config: TernaryConfig
    calibration: CalibrationConfig | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table. Fractions between 0 and 1; the teacher's own scores of the same images beside them."""

    method: str
    seed: int
    bits_per_weight: float
    attribute_accuracy: float
    all_attributes: float
    teacher_attribute_accuracy: float
    teacher_all_attributes: float
    psnr_db: float
    velocity_nmse: float
    images: int
    calibration_prompts: int
    quantize_seconds: float


def rounding(rule: str, **options: object) -> Method:
    return Method(TernaryConfig(rounding=rule, activation_dtype="none", **options))


def calibrated(
    *, correct_bias: bool = True, group_size: int = 128, activations: str = "none", **solver: object
) -> Method:
    config = TernaryConfig(group_size=group_size, activation_dtype=activations)
    return Method(config, CalibrationConfig(solver=SolverConfig(**solver), correct_bias=correct_bias))


METHODS: dict[str, Method] = {
    "absmean": rounding("absmean"),
    "twn": rounding("twn"),
    "optimum": rounding("optimum"),
    "optimum + refit": calibrated(gptq=False, rounding="optimum", descent_passes=0, correct_bias=False),
    "gptq": calibrated(refit=False, descent_passes=0, starts=1, correct_bias=False),
    "gptq + refit": calibrated(descent_passes=0, starts=1, correct_bias=False),
    "gptq + refit + descent": calibrated(starts=1, correct_bias=False),
    "gptq + refit + descent + bias": calibrated(starts=1),
    "calibrated": calibrated(),
    "calibrated, int8 activations": calibrated(activations="int8"),
    "calibrated, group 32": calibrated(group_size=32),
}


def build(method: Method, *, seed: int, prompts: int) -> DiffusionPipeline:
    pipeline = demo_pipeline()
    if method.calibration is None:
        return quantize(pipeline, method.config)
    settings = dataclasses.replace(
        method.calibration, seed=1_000_000 + 1000 * seed, batch_size=BATCH, call_kwargs=dict(DEMO_CALL)
    )
    calibrate(pipeline, training_prompts(prompts, 100 + seed), method.config, settings)
    return pipeline


def measure(
    methods: Iterable[str], *, seed: int, images: int, prompts: int, report: Callable[[Row], None]
) -> dict[str, tuple]:
    """Draws and judges everything for one seed; returns the images by method."""
    shown = tuple(held_out_prompts(images, 200 + seed))
    noise = tuple(range(10_000 * seed, 10_000 * seed + images))
    sampling = Sampling(shown, noise, DEMO_CALL, BATCH)
    run = observe_teacher(
        demo_pipeline(), sampling, scorers={"judge": judge_scorer()}, velocity_prompts=VELOCITY_PROMPTS, progress=False
    )
    drawn: dict[str, tuple] = {"teacher": run.images}
    for name in methods:
        start = time.perf_counter()
        student = build(METHODS[name], seed=seed, prompts=prompts)
        seconds = time.perf_counter() - start
        result = compare(student, run, progress=False)
        assert result.velocity is not None
        accuracy, complete = result.scores["attribute_accuracy"], result.scores["all_attributes"]
        drawn[name] = result.student_images
        report(
            Row(
                method=name,
                seed=seed,
                bits_per_weight=stored_size(student.transformer).bits_per_weight,
                attribute_accuracy=accuracy.student,
                all_attributes=complete.student,
                teacher_attribute_accuracy=accuracy.teacher,
                teacher_all_attributes=complete.teacher,
                psnr_db=result.psnr_db,
                velocity_nmse=result.velocity.overall,
                images=images,
                calibration_prompts=0 if METHODS[name].calibration is None else prompts,
                quantize_seconds=seconds,
            )
        )
    return drawn


def machine() -> str:
    names = ("diffusers-ternary", "diffusers", "transformers", "torch")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return f"{platform.machine()}, {torch.get_num_threads()} thread(s); python {platform.python_version()}, {versions}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--images", type=int, default=512, help="held-out prompts, one image each")
    parser.add_argument("--prompts", type=int, default=128, help="calibration prompts")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--output", type=Path, default=RESULTS / "quality.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the model is small: one thread is fastest, and sums are in the same order everywhere
    arguments.output.parent.mkdir(exist_ok=True)
    rows: list[Row] = []

    def report(row: Row) -> None:
        rows.append(row)
        print(
            f"seed {row.seed}  {row.method:30} {row.bits_per_weight:.3f} bits  "
            f"attributes {row.attribute_accuracy:.4f} of {row.teacher_attribute_accuracy:.4f}  "
            f"all {row.all_attributes:.4f} of {row.teacher_all_attributes:.4f}  "
            f"PSNR {row.psnr_db:.2f} dB  velocity NMSE {row.velocity_nmse:.5f}  {row.quantize_seconds:.0f} s",
            flush=True,
        )
        with arguments.output.open("w", newline="", encoding="utf-8") as file:
            file.write(f"# {machine()}\n")
            writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
            writer.writeheader()
            writer.writerows(
                {key: round(value, 6) if isinstance(value, float) else value for key, value in vars(row).items()}
                for row in rows
            )

    for seed in range(arguments.seeds):
        drawn = measure(
            arguments.methods, seed=seed, images=arguments.images, prompts=arguments.prompts, report=report
        )
        sheet = contact_sheet(drawn, held_out_prompts(arguments.images, 200 + seed), max_prompts=8)
        sheet.save(arguments.output.with_name(f"{arguments.output.stem}_seed{seed}.png"))


if __name__ == "__main__":
    main()
