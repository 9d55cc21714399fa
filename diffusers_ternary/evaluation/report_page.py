# SPDX-License-Identifier: Apache-2.0
"""The report: one HTML page that needs nothing else, and its images, plot and numbers as files beside it."""

import base64
import dataclasses
import importlib.resources
import io
import json
import math
import os
import pathlib
from collections.abc import Iterable
from typing import Any

from PIL import Image

from ..files.destinations import output_folder
from ..progress import Bar
from .judgement import BenchmarkScores
from .result import EvaluationResult
from .velocity_plot import plot_velocity_error


EMBEDDED_SIZE = 512  # pixels; larger images are embedded scaled, and written in full beside the page
_WEBP_QUALITY = 90


@dataclasses.dataclass(frozen=True)
class _Pair:
    prompt: str
    seed: int
    psnr: str
    teacher: str
    student: str
    pixelated: bool
    teacher_note: str = ""
    student_note: str = ""


@dataclasses.dataclass(frozen=True)
class _Plot:
    light: str
    dark: str
    alternative: str


def write_report(
    result: EvaluationResult,
    directory: str | os.PathLike[str],
    *,
    student_name: str,
    teacher_name: str,
    max_images: int = 48,
) -> pathlib.Path:
    """Writes `index.html`, `result.json`, `contact_sheet.png`, `velocity_error.png` and `images/*.png`.

    Args:
        result ([`EvaluationResult`]): what to show.
        directory (`str` or `os.PathLike`): made if it does not exist; takes the place of an earlier report.
        student_name, teacher_name (`str`): how the page calls them.
        max_images (`int`, *optional*, defaults to 48): pairs shown on the page; files are written for all.

    Returns:
        `pathlib.Path`: of the page. It makes no request, to this folder or elsewhere.

    Raises:
        FileExistsError: if the directory holds something else.
        MissingExtraError: without matplotlib (`pip install diffusers-ternary[evaluate]`).
    """
    is_report = pathlib.Path(directory, "result.json").is_file()  # nothing else is replaced unasked
    with output_folder(directory, overwrite=is_report) as folder:
        fill_report(result, folder, student_name=student_name, teacher_name=teacher_name, max_images=max_images)
    return pathlib.Path(directory, "index.html")


def fill_report(
    result: EvaluationResult, folder: pathlib.Path, *, student_name: str, teacher_name: str, max_images: int = 48
) -> None:
    """Writes the report's files into an empty folder; see [`write_report`]."""
    page = render(result, student_name=student_name, teacher_name=teacher_name, max_images=max_images)
    images = folder / "images"
    images.mkdir()
    result.save_json(folder / "result.json")
    result.contact_sheet(folder / "contact_sheet.png")
    if result.velocity is not None:
        result.plot_velocity_error(folder / "velocity_error.png")
    digits = len(str(len(result.prompts) - 1))
    pairs = list(zip(result.student_images, result.teacher_images, strict=True))
    for index, (student, teacher) in enumerate(Bar(pairs, "writing images")):
        student.save(images / f"{index:0{digits}}_student.png")
        teacher.save(images / f"{index:0{digits}}_teacher.png")
    (folder / "index.html").write_text(page, encoding="utf-8")


def render(result: EvaluationResult, *, student_name: str, teacher_name: str, max_images: int = 48) -> str:
    """The page as text; see [`write_report`]."""
    import jinja2

    source = importlib.resources.files(__package__).joinpath("report_page.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return str(
        environment.from_string(source).render(
            result=result,
            rows=result.rows(),
            student=student_name,
            teacher=teacher_name,
            pairs=_pairs(result, range(min(max_images, len(result.prompts)))),
            misses=[] if result.benchmark is None else _pairs(result, result.benchmark.misses[:max_images]),
            miss_count=0 if result.benchmark is None else len(result.benchmark.misses),
            plot=_plot(result),
            call_kwargs={name: _shown(value) for name, value in result.call_kwargs.items()},
            size="{} × {}".format(*result.teacher_images[0].size),
        )
    )


def _shown(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError:
        return repr(value)


def _pairs(result: EvaluationResult, indices: Iterable[int]) -> list[_Pair]:
    pair = result.benchmark
    return [
        _Pair(
            prompt=result.prompts[index],
            seed=result.seeds[index],
            psnr=_decibel(result.psnr_per_image[index]),
            teacher=_embedded(result.teacher_images[index]),
            student=_embedded(result.student_images[index]),
            pixelated=max(result.teacher_images[index].size) <= 128,
            teacher_note="" if pair is None else _verdict(pair.teacher, index),
            student_note="" if pair is None else _verdict(pair.student, index),
        )
        for index in indices
    ]


def _verdict(scores: BenchmarkScores, index: int) -> str:
    judgement = scores.judgements[index]
    if judgement.score in (0, 1):
        return judgement.reason or ("right" if judgement.score else "wrong")
    return f"{judgement.score:.2f}" + (f", {judgement.reason}" if judgement.reason else "")


def _decibel(value: float) -> str:
    return "identical" if math.isinf(value) else f"{value:.1f} dB"


def _plot(result: EvaluationResult) -> _Plot | None:
    if result.velocity is None:
        return None
    pictures = []
    for dark in (False, True):
        buffer = io.BytesIO()
        plot_velocity_error({"student": result.velocity}, buffer, dark=dark)
        pictures.append(_data_uri(buffer.getvalue(), "image/png"))
    errors = result.velocity.per_step
    return _Plot(
        light=pictures[0],
        dark=pictures[1],
        alternative=f"From {errors[0]:.2e} at the first step to {errors[-1]:.2e} at the last.",
    )


def _embedded(image: Image.Image) -> str:
    buffer = io.BytesIO()
    if max(image.size) <= EMBEDDED_SIZE // 2:
        image.save(buffer, format="PNG", optimize=True)
        return _data_uri(buffer.getvalue(), "image/png")
    smaller = image.copy()
    smaller.thumbnail((EMBEDDED_SIZE, EMBEDDED_SIZE), Image.Resampling.LANCZOS)
    smaller.save(buffer, format="WEBP", quality=_WEBP_QUALITY)
    return _data_uri(buffer.getvalue(), "image/webp")


def _data_uri(data: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode('ascii')}"
