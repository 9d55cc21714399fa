# SPDX-License-Identifier: Apache-2.0
"""The results of quality.py: a table in a file, and the images of the contact sheets."""

import csv
import dataclasses
import importlib.metadata
import platform
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image


SHOWN = 8  # images of each method on the contact sheet


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table. Fractions between 0 and 1; the teacher's own scores of the same images beside them."""

    method: str
    seed: str
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

    @classmethod
    def parse(cls, record: dict[str, str]) -> "Row":
        """Reads a line of the table."""
        return cls(**{field.name: field.type(record[field.name]) for field in dataclasses.fields(cls)})  # type: ignore[operator, misc]


class Table:
    """The rows so far, in a file that is complete after every row.

    Args:
        path (`Path`): CSV file; its rows are read if it exists.
        order (`Sequence[str]`): of the methods.
    """

    def __init__(self, path: Path, order: Sequence[str]) -> None:
        self._path = path
        self._order = list(order)
        self._rows: dict[tuple[str, str], Row] = {}
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                lines = [line for line in file if not line.startswith("#")]
            rows = [Row.parse(record) for record in csv.DictReader(lines)]
            self._rows = {(row.method, row.seed): row for row in rows if row.seed != "mean"}

    def has(self, method: str, seed: int, *, images: int, prompts: int) -> bool:
        """Whether there is a row of as many images and, if it was calibrated, as many prompts."""
        row = self._rows.get((method, str(seed)))
        return row is not None and row.images == images and row.calibration_prompts in (0, prompts)

    def add(self, row: Row) -> None:
        """Replaces or adds a row, and writes the file."""
        self._rows[row.method, row.seed] = row
        rows = sorted(self._rows.values(), key=self._place)
        by_method: dict[str, list[Row]] = {}
        for known in rows:
            by_method.setdefault(known.method, []).append(known)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("w", newline="", encoding="utf-8") as file:
            file.write(f"# {machine()}\n")
            writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)], lineterminator="\n")
            writer.writeheader()
            for group in by_method.values():
                for line in [*group, mean(group)]:
                    values = vars(line).items()
                    writer.writerow({key: round(x, 6) if isinstance(x, float) else x for key, x in values})

    def _place(self, row: Row) -> tuple[int, str]:
        return (self._order.index(row.method) if row.method in self._order else len(self._order), row.seed)


def mean(rows: Sequence[Row]) -> Row:
    """The mean over the seeds of one method."""
    means = {
        field.name: sum(getattr(row, field.name) for row in rows) / len(rows)
        for field in dataclasses.fields(Row)
        if field.type is float
    }
    return dataclasses.replace(rows[0], seed="mean", **means)


def machine() -> str:
    names = ["diffusers-ternary", "diffusers", "transformers", "torch"]
    packages = {distribution.metadata["Name"] for distribution in importlib.metadata.distributions()}
    names += [name for name in ("sdnq", "optimum-quanto", "torchao") if name in packages]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return f"{platform.machine()}, {torch.get_num_threads()} thread(s); python {platform.python_version()}, {versions}"


def save_strip(folder: Path, name: str, images: Sequence[Image.Image]) -> None:
    """Keeps the first images of a method side by side, for the contact sheet of a later run."""
    width, height = images[0].size
    strip = Image.new("RGB", (SHOWN * width, height))
    for index, image in enumerate(images[:SHOWN]):
        strip.paste(image, (index * width, 0))
    folder.mkdir(parents=True, exist_ok=True)
    strip.save(folder / f"{_slug(name)}.png")


def load_strip(folder: Path, name: str) -> tuple[Image.Image, ...]:
    """What [`save_strip`] kept; empty if there is nothing."""
    path = folder / f"{_slug(name)}.png"
    if not path.exists():
        return ()
    strip = Image.open(path)
    width = strip.width // SHOWN
    return tuple(strip.crop((i * width, 0, (i + 1) * width, strip.height)) for i in range(SHOWN))


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower())
