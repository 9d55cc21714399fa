# SPDX-License-Identifier: Apache-2.0
"""What each way to low-bit weights leaves of the embedded pipeline, on prompts that nothing was trained on.

    python integration_tests/benchmarks/quality.py                     # every method, three seeds
    python integration_tests/benchmarks/quality.py --seeds 0 --images 64 --methods twn calibrated

All linear layers inside the blocks are converted, modulation included. A seed decides the calibration prompts, their
noise, and the prompts and noise that are compared. The judge counts attributes; PSNR and velocity error are against
the teacher's images and denoiser outputs. Peers (see quality_peers.py) run where they are installed.

Results go to results/quality.csv, one row per method and seed and one with the mean, and contact sheets to
results/quality_seed<n>.png. A rerun keeps the rows that are there, so an interrupted table goes on. PSNR is of the
mean squared error over all images, so one trajectory that ends elsewhere weighs as much as all others.
quantize_seconds is wall time on whatever else the machine did, and without the layers that rows share.
"""

import argparse
import dataclasses
import hashlib
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from quality_peers import PEERS, apply_peer
from quality_table import SHOWN, Row, Table, load_strip, save_strip

from diffusers_ternary import TernaryConfig, quantize
from diffusers_ternary.backend import plan_pipeline
from diffusers_ternary.calibration import CalibrationConfig, SensitivityConfig, SolverConfig, calibrate
from diffusers_ternary.demo.grammar import held_out_prompts, training_prompts
from diffusers_ternary.demo.pipeline import DEMO_CALL, demo_pipeline
from diffusers_ternary.demo.run import judge_scorer
from diffusers_ternary.demo.variants import stored_size
from diffusers_ternary.evaluation import TeacherRun, compare, contact_sheet, observe_teacher
from diffusers_ternary.rollouts import Rollouts


RESULTS = Path(__file__).parent / "results"
WORK = Path(__file__).parents[2] / "runs" / "quality"  # ignored by git
BATCH = 32
VELOCITY_PROMPTS = 32
# At 128 columns a correction of rank 16 costs 4 bits per weight and smaller groups gain 4 %: only int8 is offered.
SENSITIVITY = SensitivityConfig(prompts=8, steps=4, group_sizes=(), ranks=())
ROTATED = {"hadamard": 128}


@dataclasses.dataclass(frozen=True)
class Seed:
    """What a seed of the table decides.

    Args:
        number (`int`): from 0.
        calibration_prompts (`int`): how many.
        work (`Path`): where calibrations keep finished layers, for a rerun and for each other, and images are kept.
    """

    number: int
    calibration_prompts: int
    work: Path

    def prompts(self) -> list[str]:
        """The prompts to calibrate on."""
        return training_prompts(self.calibration_prompts, 100 + self.number)

    @property
    def noise(self) -> int:
        """Seed of the first calibration prompt's noise."""
        return 1_000_000 + 1000 * self.number


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to low-bit weights.

    Args:
        apply (`Callable[[DiffusionPipeline, Seed], float]`): converts a pipeline in place and returns the stored bits
            per weight of all the layers that a plain [`TernaryConfig`] converts.
        calibrated (`bool`): whether it looks at prompts.
    """

    apply: Callable[[DiffusionPipeline, Seed], float]
    calibrated: bool = False


def rounding(rule: str) -> Method:
    def apply(pipeline: DiffusionPipeline, seed: Seed) -> float:
        quantize(pipeline, TernaryConfig(rounding=rule, activation_dtype="none"))
        return stored_size(pipeline.transformer).bits_per_weight

    return Method(apply)


def calibrated(
    *,
    correct_bias: bool = True,
    activations: str = "none",
    sequential: bool = False,
    size_budget: str | None = None,
    config: dict[str, object] | None = None,
    **solver: object,
) -> Method:
    def apply(pipeline: DiffusionPipeline, seed: Seed) -> float:
        settings = CalibrationConfig(
            solver=SolverConfig(**solver),
            correct_bias=correct_bias,
            sequential=sequential,
            size_budget=size_budget,
            sensitivity=SENSITIVITY if size_budget else None,
            seed=seed.noise,
            batch_size=BATCH,
            call_kwargs=dict(DEMO_CALL),
        )
        ternary = TernaryConfig(activation_dtype=activations, **(config or {}))
        # Budgets of different sizes, and none, share their layers.
        shared = repr((config, solver, correct_bias, sequential, activations)).encode()
        work_dir = seed.work / "layers" / f"{seed.number}-{hashlib.sha256(shared).hexdigest()[:8]}"
        return calibrate(pipeline, seed.prompts(), ternary, settings, work_dir=work_dir).ternary_report.bits_per_weight

    return Method(apply, calibrated=True)


def peer(name: str) -> Method:
    def apply(pipeline: DiffusionPipeline, seed: Seed) -> float:
        plan = plan_pipeline(pipeline, TernaryConfig())["transformer"]
        return apply_peer(PEERS[name], pipeline.transformer, list(plan.kinds))

    return Method(apply)


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
    "calibrated, rotated": calibrated(config=ROTATED),
    "calibrated, rotated, sequential": calibrated(config=ROTATED, sequential=True),
    "calibrated, int8 activations": calibrated(activations="int8"),
    "calibrated, group 32": calibrated(config={"group_size": 32}),
    "budget 1.9 bits": calibrated(config=ROTATED, size_budget="1.9 bits"),
    "budget 2.1 bits": calibrated(config=ROTATED, size_budget="2.1 bits"),
    **{name: peer(name) for name, available in PEERS.items() if available.installed},
}


def measure(name: str, run: TeacherRun, seed: Seed) -> tuple[Row, tuple[Image.Image, ...]]:
    """Converts a fresh pipeline, draws and judges."""
    method = METHODS[name]
    student = demo_pipeline()
    start = time.perf_counter()
    bits = method.apply(student, seed)
    seconds = time.perf_counter() - start
    result = compare(student, run, progress=False)
    assert result.velocity is not None
    accuracy, complete = result.scores["attribute_accuracy"], result.scores["all_attributes"]
    row = Row(
        method=name,
        seed=str(seed.number),
        bits_per_weight=bits,
        attribute_accuracy=accuracy.student,
        all_attributes=complete.student,
        teacher_attribute_accuracy=accuracy.teacher,
        teacher_all_attributes=complete.teacher,
        psnr_db=result.psnr_db,
        velocity_nmse=result.velocity.overall,
        images=len(result.prompts),
        calibration_prompts=seed.calibration_prompts if method.calibrated else 0,
        quantize_seconds=seconds,
    )
    return row, result.student_images


def run_seed(methods: Iterable[str], table: Table, seed: Seed, *, images: int, output: Path) -> None:
    """Measures what the table lacks for one seed, and draws its contact sheet."""
    done = {"images": images, "prompts": seed.calibration_prompts}
    missing = [name for name in methods if not table.has(name, seed.number, **done)]
    if not missing:
        return
    shown = tuple(held_out_prompts(images, 200 + seed.number))
    noise = tuple(range(10_000 * seed.number, 10_000 * seed.number + images))
    run = observe_teacher(
        demo_pipeline(),
        Rollouts(shown, noise, DEMO_CALL, BATCH),
        scorers={"judge": judge_scorer()},
        velocity_prompts=VELOCITY_PROMPTS,
        progress=False,
    )
    strips = seed.work / "images" / str(seed.number)
    save_strip(strips, "teacher", run.images)
    for name in missing:
        row, drawn = measure(name, run, seed)
        save_strip(strips, name, drawn)
        table.add(row)
        print(
            f"seed {row.seed}  {row.method:30} {row.bits_per_weight:.3f} bits  "
            f"attributes {row.attribute_accuracy:.4f} of {row.teacher_attribute_accuracy:.4f}  "
            f"all {row.all_attributes:.4f} of {row.teacher_all_attributes:.4f}  "
            f"PSNR {row.psnr_db:.2f} dB  velocity NMSE {row.velocity_nmse:.5f}  {row.quantize_seconds:.0f} s",
            flush=True,
        )
    rows = {name: load_strip(strips, name) for name in ("teacher", *METHODS)}
    sheet = contact_sheet({name: strip for name, strip in rows.items() if strip}, shown[:SHOWN], max_prompts=SHOWN)
    sheet.save(output.with_name(f"{output.stem}_seed{seed.number}.png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--images", type=int, default=128, help="held-out prompts, one image each")
    parser.add_argument("--prompts", type=int, default=256, help="calibration prompts")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--output", type=Path, default=RESULTS / "quality.csv")
    parser.add_argument("--work", type=Path, default=WORK, help="for layers and images that a rerun needs")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the model is small: one thread is fastest, and sums are in the same order everywhere
    if arguments.fresh:
        arguments.output.unlink(missing_ok=True)
        shutil.rmtree(arguments.work, ignore_errors=True)
    table = Table(arguments.output, list(METHODS))
    for number in arguments.seeds:
        seed = Seed(number, arguments.prompts, arguments.work)
        run_seed(arguments.methods, table, seed, images=arguments.images, output=arguments.output)


if __name__ == "__main__":
    main()
