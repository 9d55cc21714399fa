# SPDX-License-Identifier: Apache-2.0
"""What each way to low-bit weights leaves of a Scenes teacher: GenEval's tasks, on prompts nothing was tuned on.

    python integration_tests/benchmarks/quality.py                                # all rows, three seeds
    python integration_tests/benchmarks/quality.py --seeds 0 --count 102 --rows twn calibrated
    python integration_tests/benchmarks/quality.py --teacher sana                  # results/scenes_sana.csv

All linear layers inside the blocks are converted, modulation included; each row is converted once. A seed decides the
prompts and the noise of the pictures, which are held out (see examples/scenes/README.md): no calibration, no training,
no choice of a checkpoint or of the call saw one of these prompts. All pictures are drawn by the one call of
`diffusers_ternary.evaluation.scenes.call`, in bfloat16, by stock layers with dequantized weights; the rows called
"packed" are drawn by the packed layers. Peers (see quality_peers.py) run where they are installed.

Results go to results/scenes.csv: one line per row and seed, then mean and standard deviation over the seeds. Beside it
are a plot and a contact sheet for each seed. What is finished is written at once and skipped by a rerun, as are
conversions and trainings. Seconds are CPU time.
"""

import argparse
import contextlib
import dataclasses
import functools
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from quality_methods import METHODS, Effort, Workshop, seconds
from quality_peers import PACKAGES
from quality_table import SHOWN, Row, Table, load_strip, machine, mean_psnr, save_strip
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusers_ternary.cli.quiet import quiet_hosts
from diffusers_ternary.evaluation import EvaluationResult, Scenes, TeacherRun, compare, contact_sheet
from diffusers_ternary.evaluation import observe_teacher as observe
from diffusers_ternary.evaluation.scenes.call import GUIDANCE, STEPS, scenes_call
from diffusers_ternary.evaluation.scenes.files import TEACHERS, scenes_file
from diffusers_ternary.rollouts import Rollouts, weights_sha256


RESULTS = Path(__file__).parent / "results"
WORK = Path(__file__).parents[2] / "runs" / "scenes"  # ignored by git
BATCH = 64
VELOCITY_PROMPTS = 32
TEACHER = "teacher, bfloat16"


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all rows share.

    Args:
        workshop ([`Workshop`]): loads teachers, converts.
        table ([`Table`]): of the results.
        count (`int`): prompts of a seed.
        output (`Path`): the table's file; sheets lie beside it.
    """

    workshop: Workshop
    table: Table
    count: int
    output: Path

    def run_seed(self, rows: Iterable[str], seed: int) -> None:
        """Measures what the table lacks for one seed, and draws its contact sheet."""
        effort = self.workshop.effort
        missing = [name for name in rows if not self.table.has(name, seed, METHODS[name].how(effort))]
        strips = self.workshop.work / "pictures" / str(seed)
        if not missing and self.table.has(TEACHER, seed, ""):
            return
        run, each = self.observe_teacher(seed)
        save_strip(strips, TEACHER, run.images)
        self.report(teacher_row(run, seed, each))
        for name in missing:
            row, result = self.measure(name, run, seed)
            save_strip(strips, name, result.student_images)
            self.report(row)
        count = min(SHOWN, self.count)
        pictures = {name: load_strip(strips, name, count) for name in (TEACHER, *METHODS)}
        shown = {name: strip for name, strip in pictures.items() if strip}
        sheet = contact_sheet(shown, run.rollouts.prompts[:count], max_prompts=count)
        sheet.save(self.output.with_name(f"{self.output.stem}_seed{seed}.png"))

    def report(self, row: Row) -> None:
        """Adds a row to the table, and prints it."""
        self.table.add(row)
        print(
            f"seed {row.seed}  {row.row:30} {row.bits_per_weight:6.3f} bits  overall {100 * row.overall:5.1f} of "
            f"{100 * row.teacher_overall:5.1f}  PSNR {row.psnr_mean_db:5.2f} ({row.psnr_pooled_db:5.2f} pooled)  "
            f"velocity NMSE {row.velocity_nmse:.5f}  {row.convert_seconds:.0f} s + {row.draw_seconds:.3f} s a picture",
            flush=True,
        )

    def observe_teacher(self, seed: int) -> tuple[TeacherRun, float]:
        """The teacher's pictures and scores on the prompts of a seed, and its seconds a picture."""
        benchmark = Scenes(count=self.count, seed=seed)
        noise = tuple(range(1_000_003 * seed, 1_000_003 * seed + self.count))
        pipeline = self.workshop.load()
        rollouts = Rollouts(benchmark.prompts, noise, scenes_call(pipeline), BATCH)
        before = seconds()
        with attention():
            run = observe(pipeline, rollouts, benchmark=benchmark, velocity_prompts=VELOCITY_PROMPTS, progress=False)
        return run, (seconds() - before) / self.count

    def measure(self, name: str, run: TeacherRun, seed: int) -> tuple[Row, EvaluationResult]:
        """Converts, draws and judges."""
        method = METHODS[name]
        conversion = self.workshop.convert(name)
        student = self.workshop.load()
        student.transformer = conversion.load(student, packed=method.same_as is not None).to(run.teacher.device)
        before = seconds()
        with attention():
            result = compare(student, run, progress=False)
        each = (seconds() - before) / self.count
        assert result.velocity is not None
        assert result.benchmark is not None
        pair = result.benchmark
        row = Row(
            row=name,
            seed=str(seed),
            bits_per_weight=conversion.bits_per_weight,
            overall=pair.student.overall,
            **pair.student.per_task,
            teacher_overall=pair.teacher.overall,
            relative=pair.relative,
            psnr_mean_db=mean_psnr(result.psnr_per_image),
            psnr_pooled_db=result.psnr_db,
            velocity_nmse=result.velocity.overall,
            pictures=self.count,
            how=method.how(self.workshop.effort),
            convert_seconds=conversion.seconds,
            draw_seconds=each,
            machine=machine(PACKAGES),
        )
        return row, result


def teacher_row(run: TeacherRun, seed: int, each: float) -> Row:
    """The line of the teacher itself."""
    assert run.benchmark_scores is not None
    overall = run.benchmark_scores.overall
    return Row(
        row=TEACHER,
        seed=str(seed),
        bits_per_weight=16.0,
        overall=overall,
        **run.benchmark_scores.per_task,
        teacher_overall=overall,
        relative=1.0,
        psnr_mean_db=float("nan"),
        psnr_pooled_db=float("nan"),
        velocity_nmse=0.0,
        pictures=len(run.images),
        how="",
        convert_seconds=0.0,
        draw_seconds=each,
        machine=machine(PACKAGES),
    )


@contextlib.contextmanager
def attention() -> Iterator[None]:
    """Plain products on a CPU: with 82 tokens they are faster than its fused attention."""
    if torch.cuda.is_available():
        yield
    else:
        with sdpa_kernel(SDPBackend.MATH):
            yield


def load_teacher(folder: Path) -> DiffusionPipeline:
    """The float pipeline in bfloat16."""
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def identify(pipeline: DiffusionPipeline) -> str:
    """Name and hash of a teacher."""
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return f"{type(pipeline.transformer).__name__}-{weights_sha256(modules)[:12]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="flux", help=f"{' or '.join(TEACHERS)}, or a pipeline folder")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--count", type=int, default=553, help="held-out prompts a seed, one picture each")
    parser.add_argument(
        "--rows", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="ROW", help="default: all"
    )
    parser.add_argument("--list", action="store_true", help="print the rows, and what is missing for them")
    parser.add_argument("--calibration-prompts", type=int, default=256)
    parser.add_argument("--distillation-prompts", type=int, default=2048)
    parser.add_argument("--scale-steps", type=int, default=300, help="updates of the row distilled scales")
    parser.add_argument("--full-steps", type=int, default=1000, help="updates of the row distilled full")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="default: results/scenes.csv, of SANA scenes_sana.csv")
    parser.add_argument("--work", type=Path, default=WORK, help="for conversions, trainings and pictures")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    arguments = parser.parse_args()
    missing = {name: METHODS[name].missing for name in arguments.rows if METHODS[name].missing}
    if arguments.list:
        print(
            "\n".join(f"{name}{': needs ' + ', '.join(missing[name]) if name in missing else ''}" for name in METHODS)
        )
        return
    for name, packages in missing.items():
        print(f"{name}: left out, {', '.join(packages)} not installed", file=sys.stderr)
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    quiet_hosts()
    folder = scenes_file(arguments.teacher) if arguments.teacher in TEACHERS else Path(arguments.teacher)
    load = functools.partial(load_teacher, folder)
    teacher = identify(load())
    about = f"Scenes, {teacher}; {STEPS} steps, guidance {GUIDANCE:g}; {arguments.count} held-out prompts a seed"
    name = f"scenes_{arguments.teacher}.csv" if arguments.teacher in TEACHERS[1:] else "scenes.csv"
    output = arguments.output or RESULTS / name
    work = arguments.work / teacher
    if arguments.fresh:
        output.unlink(missing_ok=True)
        shutil.rmtree(work, ignore_errors=True)
    effort = Effort(
        arguments.calibration_prompts, arguments.distillation_prompts, arguments.scale_steps, arguments.full_steps
    )
    table = Table(output, [TEACHER, *METHODS], about)
    bench = Bench(Workshop(load, work, effort), table, arguments.count, output)
    for seed in arguments.seeds:
        bench.run_seed([name for name in arguments.rows if name not in missing], seed)
        table.plot(output.with_suffix(".png"))


if __name__ == "__main__":
    main()
