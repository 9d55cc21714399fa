# SPDX-License-Identifier: Apache-2.0
"""Make the ternary Scenes model that `diffusers-ternary demo --scenes` draws with, and put it into the package.

    python examples/scenes/embed_ternary.py runs/scenes/Flux.../converted/distilled-full-.../model   # of quality.py
    python examples/scenes/embed_ternary.py --row "distilled full" --distill-steps 1000                # makes it

The scores that the demo shows, of this model and of its teacher, are those of the benchmark's table.
"""

from __future__ import annotations

import argparse
import csv
import io
import logging
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from storage import save_pipeline
from students import calibrate_student, distill_student

from diffusers_ternary.backend import bits_per_weight, packed_layers
from diffusers_ternary.demo.scenes import FIGURES, FOLDER
from diffusers_ternary.evaluation.geneval import TASKS
from diffusers_ternary.evaluation.scenes.files import JUDGE, TEACHERS, scenes_file
from diffusers_ternary.files import new_folder, write_json


logger = logging.getLogger("embed_ternary")
TABLE = Path(__file__).parents[2] / "integration_tests" / "benchmarks" / "results" / "scenes.csv"
TEACHER_ROW = "teacher, bfloat16"
LIMIT = 9_000_000  # bytes


def figures_of(table: Path, row: str) -> dict[str, Any]:
    """Means over the seeds in the benchmark's table, of a row and of the teacher.

    Raises:
        ValueError: If the table has no such row.
    """
    with table.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(line for line in file if not line.startswith("#")))
    means = {line["row"]: line for line in lines if line["seed"] == "mean"}
    missing = [name for name in (row, TEACHER_ROW) if name not in means]
    if missing:
        raise ValueError(f"{table} has no row {missing[0]!r}; it has {', '.join(means)}.")
    names = ("overall", *TASKS)
    return {
        "row": row,
        "seeds": sum(line["row"] == row and line["seed"].isdecimal() for line in lines),
        "pictures": int(means[row]["pictures"]),
        "bits_per_weight": float(means[row]["bits_per_weight"]),
        "psnr_mean_db": float(means[row]["psnr_mean_db"]),
        "ternary": {name: float(means[row][name]) for name in names},
        "teacher": {name: float(means[TEACHER_ROW][name]) for name in names},
    }


def make_student(
    teacher_folder: Path, work: Path, *, prompts: int, steps: int, training_prompts: int
) -> torch.nn.Module:
    """Calibrate, then distill all codes for ``steps`` updates (none if 0); the packed transformer."""
    pipeline = DiffusionPipeline.from_pretrained(teacher_folder, dtype=torch.bfloat16)
    calibrate_student(pipeline, prompts=prompts, work_dir=work / "layers")
    if not steps:
        return pipeline.transformer
    teacher = DiffusionPipeline.from_pretrained(teacher_folder, dtype=torch.bfloat16)
    run = work / "run"
    return distill_student(
        teacher, pipeline.transformer, run, mode="full", steps=steps, prompts=training_prompts
    ).transformer


def write(pipeline: DiffusionPipeline, judge: Path, figures: dict[str, Any], folder: Path) -> None:
    """Write the pipeline folder of the demo: what is not packed in bfloat16, the judge, the figures."""
    for parameter in pipeline.transformer.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.bfloat16)
    with new_folder(folder) as part:
        save_pipeline(pipeline, part)
        shutil.copy(judge, part / JUDGE)
        write_json(part / FIGURES, figures, allow_nan=False)


def sizes(folder: Path) -> tuple[int, int]:
    """Bytes of a folder's files, as they are and as a wheel compresses them."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            archive.write(path)
    return sum(path.stat().st_size for path in files), buffer.tell()


def main() -> None:
    """Command line of the embedding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="folder of the packed transformer; default: make one")
    parser.add_argument("--teacher", default="flux", help="flux, or a pipeline folder")
    parser.add_argument("--table", type=Path, default=TABLE, help="the benchmark's results")
    parser.add_argument("--row", default="distilled full", help="the line of the table that the model belongs to")
    parser.add_argument("--output", type=Path, default=FOLDER, help="default: into the package")
    parser.add_argument("--work", type=Path, default=Path("runs/embed_scenes"), help="of a model that is made here")
    parser.add_argument("--calibration-prompts", type=int, default=256)
    parser.add_argument("--distillation-prompts", type=int, default=2048)
    parser.add_argument("--distill-steps", type=int, default=1000, help="0 = calibrate only")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_flush_denormal(True)
    figures = figures_of(arguments.table, arguments.row)
    judge = scenes_file(JUDGE)
    folder = scenes_file(arguments.teacher) if arguments.teacher in TEACHERS else Path(arguments.teacher)
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    if arguments.model is not None:
        pipeline.transformer = type(pipeline.transformer).from_pretrained(arguments.model, dtype=torch.bfloat16)
    else:
        pipeline.transformer = make_student(
            folder,
            arguments.work,
            prompts=arguments.calibration_prompts,
            steps=arguments.distill_steps,
            training_prompts=arguments.distillation_prompts,
        )
    layers = packed_layers(pipeline.transformer)
    if not layers:
        raise SystemExit(f"{arguments.model} is not a packed transformer.")
    write(pipeline, judge, figures, arguments.output)
    plain, zipped = sizes(arguments.output)
    bits = bits_per_weight({name: layer.spec for name, layer in layers.items()})
    logger.info("%s: %.3f bits per weight, %d bytes, %d in a wheel", arguments.output, bits, plain, zipped)
    if plain > LIMIT:
        raise SystemExit(f"{plain} bytes are more than the {LIMIT} that the package may carry.")


if __name__ == "__main__":
    main()
