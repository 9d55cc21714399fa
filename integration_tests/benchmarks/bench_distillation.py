# SPDX-License-Identifier: Apache-2.0
"""Learning curves of distillation: what an update buys, in held-out velocity error, against CPU-seconds.

    python integration_tests/benchmarks/bench_distillation.py                     # the embedded model
    python integration_tests/benchmarks/bench_distillation.py --teacher flux      # Scenes
    python integration_tests/benchmarks/bench_distillation.py --steps 4           # a few-step teacher and student

Every setting starts from the same calibrated student, with the same prompts and noise. A learning rate that ends at
its lowest is a part of a setting, so each length is a run of its own; the points within a run say how it got there.
What a run keeps is judged on pictures: their score as a share of the teacher's, and their PSNR to the teacher's.

Results go to results/distillation_curves.csv, one line per evaluation, with a plot beside it. Runs are kept in --work
and not repeated. Seconds are CPU time of the updates; the teacher's trajectories are drawn once for all settings.
"""

import argparse
import csv
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from quality import attention, load_teacher
from quality_table import machine, mean_psnr
from students import HELD_BACK, RECIPE, TRAINING, calibrate_student, tuning_prompts

from diffusers_ternary import TernaryConfig
from diffusers_ternary.backend.dequantize import dequantize_layers
from diffusers_ternary.cli.quiet import quiet_hosts
from diffusers_ternary.demo import DEMO_CALL, demo_pipeline, held_out_prompts, training_prompts
from diffusers_ternary.demo.run import judge_scorer
from diffusers_ternary.demo.variants import find_variant
from diffusers_ternary.distillation import DistillConfig, DistillReport, distill
from diffusers_ternary.evaluation import Scenes, TeacherRun, compare, observe_teacher
from diffusers_ternary.evaluation.scenes.call import scenes_call
from diffusers_ternary.evaluation.scenes.files import TEACHERS, scenes_file
from diffusers_ternary.rollouts import Rollouts


RESULTS = Path(__file__).parent / "results"
WORK = Path(__file__).parents[2] / "runs" / "distillation"  # ignored by git
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "control": {"mode": "scales", "train_scales": False},
    "scales": {"mode": "scales"},
    "full": {"mode": "full"},
}
COLUMNS = (
    "teacher",
    "steps",
    "setting",
    "updates",
    "step",
    "cpu_seconds",
    "velocity_nmse",
    "share_of_score",
    "psnr_db",
)


@dataclasses.dataclass(frozen=True)
class Bed:
    """A teacher with what its students are trained and judged on.

    Args:
        pipeline (`DiffusionPipeline`): the teacher in bfloat16.
        student (`torch.nn.Module`): its calibrated transformer.
        call (`Mapping[str, Any]`): arguments of the pipeline call.
        training, held_back, judged (`tuple[str, ...]`): prompts of each purpose.
        judge (`Mapping[str, Any]`): argument of [`observe_teacher`] that scores the pictures.
        score (`str`): name of the score, where it is one of a scorer.
    """

    pipeline: DiffusionPipeline
    student: torch.nn.Module
    call: Mapping[str, Any]
    training: tuple[str, ...]
    held_back: tuple[str, ...]
    judged: tuple[str, ...]
    judge: Mapping[str, Any]
    score: str | None = None

    def observe(self) -> TeacherRun:
        """The teacher's pictures and their score."""
        rollouts = Rollouts(
            self.judged, tuple(range(10_000, 10_000 + len(self.judged))), self.call, RECIPE["batch_size"]
        )
        return observe_teacher(self.pipeline, rollouts, velocity_prompts=0, progress=False, **self.judge)

    def measure(self, student: DiffusionPipeline, run: TeacherRun) -> tuple[float, float]:
        """Share of the teacher's score, and mean PSNR to its pictures."""
        dequantize_layers(student.transformer, torch.bfloat16)  # several times faster on a CPU, and the same pictures
        result = compare(student, run, progress=False)
        if self.score is None:
            assert result.benchmark is not None
            share = result.benchmark.relative
        else:
            pair = result.scores[self.score]
            share = pair.student / pair.teacher
        return share, mean_psnr(result.psnr_per_image)


def embedded(steps: int, prompts: int, pictures: int, _work: Path) -> Bed:
    """The embedded model."""
    return Bed(
        demo_pipeline(torch_dtype=torch.bfloat16),
        find_variant("calibrated").load(torch.bfloat16).transformer,
        {**DEMO_CALL, "num_inference_steps": steps},
        tuple(training_prompts(prompts, 500)),
        tuple(held_out_prompts(32, 700)),
        tuple(held_out_prompts(pictures, 300)),
        {"scorers": {"judge": judge_scorer()}},
        "all_attributes",
    )


def scenes(folder: Path, steps: int, prompts: int, pictures: int, work: Path) -> Bed:
    """A Scenes teacher, with a student calibrated for this call."""
    pipeline, copy = load_teacher(folder), load_teacher(folder)
    calibrate_student(copy, prompts=min(prompts, 256), work_dir=work / "layers")
    unseen = tuple(dict.fromkeys(tuning_prompts(32, HELD_BACK)))
    benchmark = Scenes(count=pictures, seed=0)
    return Bed(
        pipeline,
        copy.transformer,
        scenes_call(pipeline, steps=steps),
        tuple(prompt for prompt in tuning_prompts(prompts, TRAINING) if prompt not in unseen),
        unseen,
        tuple(benchmark.prompts),
        {"benchmark": benchmark},
    )


def train(
    bed: Bed, name: str, updates: int, seed: int, batch_size: int, work: Path
) -> tuple[DiffusionPipeline, DistillReport]:
    """One run of a setting, or what an earlier call left of it."""
    recipe = {**RECIPE, "batch_size": batch_size, **SETTINGS[name]}
    config = DistillConfig(
        updates=updates,
        seed=seed,
        call_kwargs=bed.call,
        calibration=None,
        evaluate_every=max(1, updates // 4),
        **recipe,
    )
    student = distill(
        bed.pipeline,
        bed.training,
        TernaryConfig(activation_dtype="none"),
        config,
        work / f"{name}-{updates}-{seed}-{batch_size}",
        student=bed.student,
        held_out_prompts=bed.held_back,
        cache_dir=work / f"latents-{batch_size}",
        progress=False,
    )
    return student, student.ternary_report


def lines(
    bed: Bed, run: TeacherRun, about: Mapping[str, Any], trained: tuple[DiffusionPipeline, DistillReport]
) -> Iterator[dict[str, Any]]:
    """One line for each evaluation of a run; the best one, which is kept, with its pictures' score."""
    student, report = trained
    for point in report.history:
        share, psnr = bed.measure(student, run) if point.step == report.best_step else ("", "")
        yield {
            **about,
            "step": point.step,
            "cpu_seconds": round(point.cpu_seconds, 1),
            "velocity_nmse": round(point.held_out, 6),
            "share_of_score": share and round(share, 4),
            "psnr_db": psnr and round(psnr, 2),
        }


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """The table, after a line that names the machine, and its plot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(f"# {machine(())}\n")
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """Held-out error against CPU-seconds, a color for each setting and a line for each run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    runs: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for row in rows:
        point = (float(row["cpu_seconds"]), float(row["velocity_nmse"]))
        runs.setdefault((row["setting"], int(row["updates"])), []).append(point)
    colors = {name: f"C{number}" for number, name in enumerate(dict.fromkeys(name for name, _ in runs))}
    named = set()
    for (name, updates), points in runs.items():
        label = None if name in named else name
        named.add(name)
        axes.plot(*zip(*points, strict=True), marker=".", color=colors[name], label=label)
        axes.annotate(f"{updates}", points[-1], xytext=(4, 2), textcoords="offset points", fontsize=7)
    axes.set(yscale="log", xlabel="CPU-seconds of the updates", ylabel="held-out velocity NMSE")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--teacher", default="embedded", help=f"embedded, {', '.join(TEACHERS)}, or a Scenes pipeline folder"
    )
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--updates", nargs="+", type=int, default=[50, 100, 200, 400, 800], metavar="N")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED", help="of the updates")
    parser.add_argument("--steps", type=int, default=8, help="denoising steps of teacher and student")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=2048, help="training prompts")
    parser.add_argument("--pictures", type=int, default=256, help="held-out prompts that are judged, one picture each")
    parser.add_argument(
        "--output", type=Path, help="default: results/distillation_curves.csv, others with their names"
    )
    parser.add_argument("--work", type=Path, default=WORK)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    quiet_hosts()
    name, steps = Path(arguments.teacher).name, arguments.steps
    suffix = "".join(
        f"_{part}" for part in ([name] if name != "embedded" else []) + ([f"{steps}_steps"] if steps != 8 else [])
    )
    output = arguments.output or RESULTS / f"distillation_curves{suffix}.csv"
    work = arguments.work / f"{name}-{steps}"
    sizes = (steps, arguments.prompts, arguments.pictures, work)
    rows: list[dict[str, Any]] = []
    with attention():
        if name == "embedded":
            bed = embedded(*sizes)
        else:
            bed = scenes(scenes_file(name) if name in TEACHERS else Path(arguments.teacher), *sizes)
        run = bed.observe()
        for updates in arguments.updates:
            for setting in arguments.settings:
                for seed in arguments.seeds:
                    trained = train(bed, setting, updates, seed, arguments.batch_size, work)
                    about = {"teacher": name, "steps": steps, "setting": setting, "updates": updates}
                    rows += lines(bed, run, about, trained)
                    write(output, rows)
                    print(rows[-1], flush=True)
    plot(output.with_suffix(".png"), rows)


if __name__ == "__main__":
    main()
