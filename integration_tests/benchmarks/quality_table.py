# SPDX-License-Identifier: Apache-2.0
"""The results of quality.py: a table in a file, its plot, and the pictures of the contact sheets."""

import csv
import dataclasses
import importlib.metadata
import math
import platform
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image

from diffusers_ternary.evaluation.geneval import TASKS


SHOWN = 12  # pictures of each row on a contact sheet: two of each task
_IDENTICAL_DB = 60.0  # PSNR of a picture that agrees in every pixel, in the mean over pictures


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: one way to low-bit weights, on the prompts of one seed.

    Args:
        row (`str`): the way.
        seed (`str`): of prompts and noise; in the lines that sum up, `"mean"` or `"sd"` (over the seeds).
        bits_per_weight (`float`): as stored, over the layers that a plain `TernaryConfig` converts.
        overall, single_object, ... (`float`): GenEval's scores, between 0 and 1.
        teacher_overall (`float`): the teacher's, on the same prompts and noise.
        relative (`float`): `overall` as a share of it.
        psnr_mean_db (`float`): PSNR to the teacher's pictures, mean over the pictures.
        psnr_pooled_db (`float`): PSNR of the mean squared error over all of them.
        velocity_nmse (`float`): error of the denoiser on the teacher's trajectories.
        pictures (`int`): one per prompt.
        how (`str`): what was used to convert (prompts, updates).
        convert_seconds (`float`): CPU time of the conversion, or wall time on a GPU.
        draw_seconds (`float`): the same for each picture.
        machine (`str`): processor and versions.
    """

    row: str
    seed: str
    bits_per_weight: float
    overall: float
    single_object: float
    two_object: float
    counting: float
    colors: float
    position: float
    color_attr: float
    teacher_overall: float
    relative: float
    psnr_mean_db: float
    psnr_pooled_db: float
    velocity_nmse: float
    pictures: int
    how: str
    convert_seconds: float
    draw_seconds: float
    machine: str

    @classmethod
    def parse(cls, record: dict[str, str]) -> "Row":
        """Reads a line of the table."""
        return cls(**{field.name: field.type(record[field.name]) for field in dataclasses.fields(cls)})  # type: ignore[operator, misc]


class Table:
    """The rows so far, in a file that is complete after every row.

    Args:
        path (`Path`): CSV file; its rows are read if it exists.
        order (`Sequence[str]`): of the rows.
        about (`str`): what all rows share, the first line of the file: teacher, call, number of pictures.

    Raises:
        ValueError: if the file holds rows of something else.
    """

    def __init__(self, path: Path, order: Sequence[str], about: str) -> None:
        self._path, self._order, self._about = path, list(order), f"# {about}"
        self._rows: dict[tuple[str, str], Row] = {}
        if not path.exists():
            return
        with path.open(newline="", encoding="utf-8") as file:
            first = file.readline().rstrip("\n")
            if first != self._about:
                raise ValueError(
                    f"{path} holds rows of other settings:\n  {first}\ninstead of\n  {self._about}\n"
                    "Choose another --output, or start over with --fresh."
                )
            rows = [Row.parse(record) for record in csv.DictReader(file)]
        self._rows = {(row.row, row.seed): row for row in rows if row.seed.isdecimal()}

    def has(self, row: str, seed: int, how: str) -> bool:
        """Whether a row is there that was made in this way."""
        found = self._rows.get((row, str(seed)))
        return found is not None and found.how == how

    def add(self, row: Row) -> None:
        """Replaces or adds a row, and writes the file."""
        self._rows[row.row, row.seed] = row
        self._path.parent.mkdir(parents=True, exist_ok=True)
        written = self._path.with_suffix(".part")
        with written.open("w", newline="", encoding="utf-8") as file:
            file.write(self._about + "\n")
            writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)], lineterminator="\n")
            writer.writeheader()
            for group in self.groups():
                for line in [*group, *summed_up(group)]:
                    values = vars(line).items()
                    writer.writerow({key: round(x, 6) if isinstance(x, float) else x for key, x in values})
        written.replace(self._path)

    def groups(self) -> Iterator[list[Row]]:
        """The rows of all seeds, way by way, in order."""
        by_name: dict[str, list[Row]] = {}
        for row in sorted(self._rows.values(), key=lambda row: int(row.seed)):
            by_name.setdefault(row.row, []).append(row)
        known = [name for name in self._order if name in by_name]
        for name in [*known, *sorted(by_name.keys() - set(known))]:
            yield by_name[name]

    def plot(self, path: Path) -> None:
        """Draws bits against overall score; bars are the standard deviation over the seeds."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 6), layout="constrained")
        axes = figure.add_subplot()
        for group in self.groups():
            mean, *deviation = summed_up(group)
            bar = 100 * deviation[0].overall if deviation else 0.0
            ours = not re.match("SDNQ|quanto|torchao|OrbitQuant|GGUF|teacher", mean.row)
            place = (mean.bits_per_weight, 100 * mean.overall)
            axes.errorbar(*place, yerr=bar, fmt="o" if ours else "s", color="C0" if ours else "C1", capsize=3)
            axes.annotate(mean.row, place, xytext=(5, 3), textcoords="offset points", fontsize=7)
        axes.set(xscale="log", xlabel="bits per weight, as stored", ylabel="overall score, percent")
        axes.set_xticks([1.6, 2, 3, 4, 6, 8, 16], labels=["1.6", "2", "3", "4", "6", "8", "16"], minor=False)
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
        figure.savefig(path, dpi=130)


def summed_up(rows: Sequence[Row]) -> Iterator[Row]:
    """The mean over the seeds of one way and, of several, the standard deviation."""
    numbers = {
        field.name: [getattr(row, field.name) for row in rows]
        for field in dataclasses.fields(Row)
        if field.type is float
    }
    yield dataclasses.replace(rows[0], seed="mean", **{name: statistics.fmean(n) for name, n in numbers.items()})
    if len(rows) > 1:
        yield dataclasses.replace(rows[0], seed="sd", **{name: _deviation(n) for name, n in numbers.items()})


def _deviation(numbers: Sequence[float]) -> float:
    return statistics.stdev(numbers) if all(map(math.isfinite, numbers)) else math.nan


def mean_psnr(per_picture: Sequence[float]) -> float:
    """Mean over pictures in dB; one without any difference counts as 60."""
    return statistics.fmean(min(value, _IDENTICAL_DB) for value in per_picture)


def machine(peers: Sequence[str]) -> str:
    """Processor, threads and versions; those of `peers` that are installed too."""
    installed = {distribution.metadata["Name"] for distribution in importlib.metadata.distributions()}
    names = ["diffusers-ternary", "diffusers", "torch", *(name for name in peers if name in installed)]
    versions = "; ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return f"{_processor()}; {torch.get_num_threads()} thread(s); {versions}"


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    name = re.search(r"model name\s*: (.*)", text)
    found = [label for label, flag in (("AMX", "amx_bf16"), ("AVX-512", "avx512f")) if flag in text]
    return " ".join([name[1] if name else platform.machine(), *found])


def save_strip(folder: Path, name: str, images: Sequence[Image.Image]) -> None:
    """Keeps the first images of a row side by side, for the contact sheet of a later run."""
    width, height = images[0].size
    strip = Image.new("RGB", (SHOWN * width, height))
    for index, image in enumerate(images[:SHOWN]):
        strip.paste(image, (index * width, 0))
    folder.mkdir(parents=True, exist_ok=True)
    strip.save(folder / f"{slug(name)}.png")


def load_strip(folder: Path, name: str, count: int) -> tuple[Image.Image, ...]:
    """The first `count` of what [`save_strip`] kept; empty if there is nothing."""
    path = folder / f"{slug(name)}.png"
    if not path.exists():
        return ()
    strip = Image.open(path)
    width = strip.width // SHOWN
    return tuple(strip.crop((i * width, 0, (i + 1) * width, strip.height)) for i in range(count))


def slug(name: str) -> str:
    """A row's name as that of a file."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower())


assert all(task in Row.__annotations__ for task in TASKS)
