# SPDX-License-Identifier: Apache-2.0
"""`EvaluationResult`: what a comparison found, as a table, JSON, contact sheet and plot."""

import dataclasses
import io
import itertools
import math
import os
from collections.abc import Mapping
from typing import Any

from PIL import Image
from rich.console import Console
from rich.table import Table

from ..files import finite, new_file, write_json
from ..rollouts import VelocityError
from .contact_sheet import contact_sheet
from .judgement import BenchmarkScores
from .velocity_plot import plot_velocity_error


@dataclasses.dataclass(frozen=True)
class ScorePair:
    """One scorer's value for both sides."""

    student: float
    teacher: float


@dataclasses.dataclass(frozen=True)
class BenchmarkPair:
    """What a benchmark says of both sides.

    Args:
        name (`str`): of the benchmark.
        student, teacher ([`BenchmarkScores`]): picture by picture, in the order of the images.
    """

    name: str
    student: BenchmarkScores
    teacher: BenchmarkScores

    @property
    def relative(self) -> float:
        """The student's overall score as a share of the teacher's; NaN if the teacher's is 0."""
        return self.student.overall / self.teacher.overall if self.teacher.overall else math.nan

    @property
    def misses(self) -> tuple[int, ...]:
        """Images where the student scores below the teacher, the worst first, then those where both miss."""
        lost = [
            (mine.score - its.score, mine.score, index)
            for index, (mine, its) in enumerate(zip(self.student.judgements, self.teacher.judgements, strict=True))
            if mine.score < 0.5 or mine.score < its.score
        ]
        return tuple(index for *_, index in sorted(lost))


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table, formatted.

    Args:
        metric (`str`): name with unit.
        student, teacher (`str`): values; empty where the metric does not apply.
        better (`str`): `"higher"`, `"lower"` or empty.
        note (`str`): how it was measured, in a few words.
    """

    metric: str
    student: str
    teacher: str
    better: str = ""
    note: str = ""


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """How far a student is from its teacher. `print` shows a table.

    Args:
        prompts (`tuple[str, ...]`), seeds (`tuple[int, ...]`): of the images.
        call_kwargs (`dict[str, Any]`): arguments of the pipeline calls.
        student_images, teacher_images (`tuple[PIL.Image.Image, ...]`): RGB, one per prompt.
        psnr_db (`float`): of the mean squared error over all images, in dB; infinite if all are identical.
        psnr_per_image (`tuple[float, ...]`): in dB.
        ssim (`float`, *optional*), lpips (`float`, *optional*): means over the images; `None` if not available.
        unavailable (`dict[str, str]`): metrics that are `None`, and why.
        velocity ([`VelocityError`], *optional*): `None` if it was left out.
        scores (`dict[str, ScorePair]`): of the scorers.
        benchmark ([`BenchmarkPair`], *optional*): `None` if none was run.
        student_seconds, teacher_seconds (`float`): wall time of all pipeline calls.
        pipeline (`str`): class of both.
        versions (`dict[str, str]`): of the libraries.
        created (`str`): UTC time, ISO 8601.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    call_kwargs: dict[str, Any]
    student_images: tuple[Image.Image, ...]
    teacher_images: tuple[Image.Image, ...]
    psnr_db: float
    psnr_per_image: tuple[float, ...]
    ssim: float | None
    lpips: float | None
    unavailable: dict[str, str]
    velocity: VelocityError | None
    scores: dict[str, ScorePair]
    student_seconds: float
    teacher_seconds: float
    pipeline: str
    versions: dict[str, str]
    created: str
    benchmark: BenchmarkPair | None = None

    @property
    def identical_images(self) -> int:
        """Pairs that agree in every pixel."""
        return sum(math.isinf(value) for value in self.psnr_per_image)

    def rows(self) -> list[Row]:
        """The table's lines."""
        identical = f"; {self.identical_images} of {len(self.prompts)} identical" if self.identical_images else ""
        rows = [
            Row("PSNR to the teacher, dB", _number(self.psnr_db, 2), "", "higher", f"8-bit RGB, pooled{identical}"),
            Row("SSIM to the teacher", self._value("ssim", self.ssim), "", "higher", self._reason("ssim")),
            Row("LPIPS to the teacher", self._value("lpips", self.lpips), "", "lower", self._reason("lpips")),
        ]
        if self.velocity is not None:
            note = f"{_count(self.velocity.prompts, 'trajectory', 'trajectories')} of the teacher"
            rows.append(Row("velocity NMSE", _number(self.velocity.overall, 5), "", "lower", note))
        for name, pair in self.scores.items():
            rows.append(Row(name.replace("_", " "), _number(pair.student, 4), _number(pair.teacher, 4), "", "scorer"))
        rows += self._benchmark_rows()
        each = [seconds / len(self.prompts) for seconds in (self.student_seconds, self.teacher_seconds)]
        rows.append(Row("seconds per image", _number(each[0], 3), _number(each[1], 3), "lower", "this machine, once"))
        return rows

    def _benchmark_rows(self) -> list[Row]:
        if self.benchmark is None:
            return []
        pair, student, teacher = self.benchmark, self.benchmark.student, self.benchmark.teacher
        share = "" if math.isnan(pair.relative) else f"{100 * pair.relative:.1f} % of the teacher's; "
        rows = [
            Row(pair.name, _percent(student.overall), _percent(teacher.overall), "higher", f"{share}mean of tasks")
        ]
        theirs = teacher.per_task
        for tag, score in student.per_task.items():
            note = _count(student.counts[tag], "image", "images")
            rows.append(Row(f"  {tag.replace('_', ' ')}", _percent(score), _percent(theirs[tag]), "higher", note))
        return rows

    def summary(self) -> str:
        """What was measured, in one line."""
        arguments = "".join(f", {name}={value!r}" for name, value in self.call_kwargs.items())
        return f"{_count(len(self.prompts), 'prompt', 'prompts')}, {_seeds(self.seeds)}, {self.pipeline}{arguments}"

    def __rich__(self) -> Table:
        table = Table(caption=self.summary(), caption_justify="left")
        table.add_column("metric")
        for heading in ("student", "teacher"):
            table.add_column(heading, justify="right")
        table.add_column("better")
        table.add_column("note", overflow="fold")
        for row in self.rows():
            table.add_row(row.metric, row.student, row.teacher, row.better, row.note)
        return table

    def __str__(self) -> str:
        buffer = io.StringIO()
        Console(file=buffer, width=110, color_system=None, markup=False).print(self)
        return buffer.getvalue()

    def __repr__(self) -> str:
        return f"EvaluationResult(psnr_db={self.psnr_db:.2f}, {self.summary()})"

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe: infinite and undefined numbers become `None` (see `identical_images`). Without the images."""
        images = [
            {"prompt": prompt, "seed": seed, "psnr_db": psnr}
            for prompt, seed, psnr in zip(self.prompts, self.seeds, self.psnr_per_image, strict=True)
        ]
        width, height = self.teacher_images[0].size
        data = {
            "prompts": len(self.prompts),
            "image_size": [width, height],
            "pipeline": self.pipeline,
            "call_kwargs": {name: _plain(value) for name, value in self.call_kwargs.items()},
            "psnr_db": self.psnr_db,
            "identical_images": self.identical_images,
            "ssim": self.ssim,
            "lpips": self.lpips,
            "unavailable": self.unavailable,
            "velocity_nmse": None if self.velocity is None else self.velocity.overall,
            "velocity": None if self.velocity is None else dataclasses.asdict(self.velocity),
            "benchmark": None if self.benchmark is None else _benchmark_dict(self.benchmark),
            "scores": {name: dataclasses.asdict(pair) for name, pair in self.scores.items()},
            "seconds": {"student": self.student_seconds, "teacher": self.teacher_seconds},
            "versions": self.versions,
            "created": self.created,
            "images": images,
        }
        return finite(data)

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Writes [`~EvaluationResult.to_dict`] to a file."""
        write_json(path, self.to_dict(), allow_nan=False)

    def contact_sheet(self, path: str | os.PathLike[str], *, max_prompts: int = 12) -> None:
        """Draws both rows of images under their prompts, into a PNG file."""
        rows = {"teacher": self.teacher_images, "student": self.student_images}
        sheet = contact_sheet(rows, self.prompts, max_prompts=max_prompts)
        with new_file(path) as temporary:
            sheet.save(temporary, format="PNG")

    def plot_velocity_error(self, path: str | os.PathLike[str]) -> None:
        """Plots the velocity NMSE over the denoising steps, into a file (format by suffix).

        Raises:
            MissingExtraError: without matplotlib (`pip install diffusers-ternary[evaluate]`).
            ValueError: if the velocity error was left out.
        """
        if self.velocity is None:
            raise ValueError("The velocity error was not measured. Evaluate with velocity_prompts above 0.")
        plot_velocity_error({"student": self.velocity}, path)

    def _value(self, name: str, value: float | None) -> str:
        return "not available" if name in self.unavailable else _number(value, 4)

    def _reason(self, name: str) -> str:
        return self.unavailable.get(name, "mean over images")


def _benchmark_dict(pair: BenchmarkPair) -> dict[str, Any]:
    sides = {"student": pair.student, "teacher": pair.teacher}
    return {
        "name": pair.name,
        "relative": pair.relative,
        "overall": {side: scores.overall for side, scores in sides.items()},
        "per_task": {side: scores.per_task for side, scores in sides.items()},
        "images": [
            {
                "task": tag,
                **{side: dataclasses.asdict(scores.judgements[index]) for side, scores in sides.items()},
            }
            for index, tag in enumerate(pair.student.tags)
        ],
    }


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return ""
    if math.isinf(value):
        return "∞ (identical)" if value > 0 else "-∞"
    if math.isnan(value):
        return "undefined"
    return f"{value:.{digits}f}" if value == 0 or abs(value) >= 10**-digits else f"{value:.1e}"


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _seeds(seeds: tuple[int, ...]) -> str:
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    consecutive = all(after == before + 1 for before, after in itertools.pairwise(seeds))
    return f"seeds {seeds[0]} to {seeds[-1]}" if consecutive else f"{len(seeds)} seeds"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else repr(value)
