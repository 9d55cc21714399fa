# SPDX-License-Identifier: Apache-2.0
"""Prompts from files and data sets, and what may be trained on of them."""

import csv
import hashlib
import io
import pathlib
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ..extras import import_extra
from ..files import parse_json
from .prompt_templates import template_prompts


TEMPLATE, DATASET, STDIN = "template:", "datasets:", "-"
_COLUMNS = ("prompt", "text", "caption")
_WRITE = "Write a string, or an object with a prompt."


def read_prompts(source: str, *, limit: int | None = None, column: str | None = None) -> list[str]:
    """Reads prompts.

    Args:
        source (`str`): one of
            - a text file with one prompt a line (blank lines are skipped), or `-` for stdin;
            - a `.jsonl` file with a string or an object a line, or a `.json` file with a list of them;
            - a `.csv` or `.tsv` file with a header, or a `.parquet` file;
            - `template:N` or `template:N:SEED`: N prompts of [`template_prompts`];
            - `datasets:NAME` or `datasets:NAME:SPLIT`: of the Hub or a local folder, through the `datasets` library
              (split `train` by default).
        limit (`int`, *optional*): the first ones only.
        column (`str`, *optional*): field with the prompts; default: `prompt`, `text`, `caption`, or the only one.

    Raises:
        FileNotFoundError: if there is no such file.
        MissingExtraError: if the library for that kind of source is not installed.
        ValueError: if it is not UTF-8 or otherwise damaged, has no such column, holds no prompts or an empty one.
    """
    if source.startswith(TEMPLATE):
        return _from_template(source)[:limit]
    if source.startswith(DATASET):
        prompts = _from_dataset(source, column)
    elif source == STDIN:
        prompts = _from_lines(_decode(sys.stdin.buffer.read(), "stdin"))
    else:
        path = pathlib.Path(source)
        if not path.is_file():
            raise FileNotFoundError(
                f"{source}: there is no such file of prompts. Give a text, JSONL, CSV or Parquet file, - for stdin, "
                f"{TEMPLATE}N or {DATASET}NAME."
            )
        prompts = _from_file(path, column)
    if not prompts:
        raise ValueError(f"{'stdin' if source == STDIN else source} holds no prompts. Write one per line.")
    return prompts[:limit]


def prompt_key(prompt: str) -> str:
    """SHA-256 of a prompt, the same for spellings that differ in case, spaces or final punctuation only."""
    text = " ".join(unicodedata.normalize("NFKC", prompt).casefold().split()).rstrip(" .,;:!?")
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def split_held_out(prompts: Sequence[str], count: int) -> tuple[list[str], list[str]]:
    """Sets prompts aside that are never trained on, chosen by their hash: the order of the list has no part in it.

    Args:
        prompts (`Sequence[str]`): all.
        count (`int`): how many different ones to set aside.

    Returns:
        `tuple[list[str], list[str]]`: what to train on, and what is held out (each once), both in their order.

    Raises:
        ValueError: if nothing would be left to train on.
    """
    keys = [prompt_key(prompt) for prompt in prompts]
    held = set(sorted(set(keys))[:count])
    if count < 1 or len(set(keys)) <= count:
        raise ValueError(
            f"{count} of {len(set(keys))} different prompts cannot be held out: they are too few to hold out so many. "
            "Give more (20 to 100 of thousands are held out), a smaller held_out, or held-out prompts of their own "
            "(--held-out FILE)."
        )
    train = [prompt for prompt, key in zip(prompts, keys, strict=True) if key not in held]
    held_out = {key: prompt for prompt, key in reversed(list(zip(prompts, keys, strict=True))) if key in held}
    return train, [held_out[key] for key in dict.fromkeys(keys) if key in held]


def check_disjoint(train: Iterable[str], held_out: Iterable[str]) -> None:
    """Checks that no held-out prompt is trained on, spelling aside.

    Raises:
        ValueError: names some of them.
    """
    keys, unseen = {prompt_key(prompt) for prompt in train}, list(held_out)
    common = [prompt for prompt in unseen if prompt_key(prompt) in keys]
    if common:
        examples = ", ".join(repr(prompt) for prompt in common[:3]) + (", ..." if len(common) > 3 else "")
        raise ValueError(
            f"{len(common)} of {len(unseen)} held-out prompts are also trained on ({examples}), so the held-out error "
            "would be flattered. Remove them from one of the two lists."
        )


def _from_template(source: str) -> list[str]:
    count, _, seed = source.removeprefix(TEMPLATE).partition(":")
    if not count.isdecimal() or not (seed or "0").isdecimal():
        raise ValueError(f"{source!r} is not {TEMPLATE}N or {TEMPLATE}N:SEED, e.g. {TEMPLATE}2000.")
    return template_prompts(int(count), int(seed or 0))


def _from_file(path: pathlib.Path, column: str | None) -> list[str]:
    suffix = path.suffix.lower()
    if suffix in (".parquet", ".pq"):
        return _from_parquet(path, column)
    text = _decode(path.read_bytes(), str(path))
    if suffix in (".jsonl", ".ndjson"):
        lines = {f"{path} line {number}": line for number, line in enumerate(text.split("\n"), start=1)}
        return [
            _prompt_in(parse_json(line, source=place, remedy=_WRITE), place, column)
            for place, line in lines.items()
            if line.strip()
        ]
    if suffix == ".json":
        content = parse_json(text, source=path, remedy=_WRITE)
        if not isinstance(content, list):
            raise ValueError(f"{path} holds no JSON list. Write a list of prompts, or of objects with a prompt each.")
        return [_prompt_in(value, f"{path} entry {index}", column) for index, value in enumerate(content)]
    if suffix in (".csv", ".tsv"):
        return _from_csv(path, text, column)
    return _from_lines(text)


def _from_lines(text: str) -> list[str]:
    # Not splitlines(): it also breaks at characters that belong into a prompt.
    lines = [line.strip() for line in text.replace("\r\n", "\n").split("\n")]
    return [line for line in lines if line]


def _from_csv(path: pathlib.Path, text: str, column: str | None) -> list[str]:
    try:
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        name = choose_column(reader.fieldnames or [], str(path), column)
        return list(_checked((f"{path} line {reader.line_num}", row[name]) for row in reader))
    except csv.Error as error:
        raise ValueError(f"{path} is not a valid CSV ({error}). Save it again as CSV with a header.") from error


def _from_parquet(path: pathlib.Path, column: str | None) -> list[str]:
    parquet = import_extra("pyarrow.parquet", "Reading Parquet files")
    try:
        file = parquet.ParquetFile(path)
        name = choose_column(file.schema_arrow.names, str(path), column)
        values = file.read(columns=[name]).column(name).to_pylist()
    except (OSError, import_extra("pyarrow", "Reading Parquet files").ArrowInvalid) as error:
        raise ValueError(f"{path} is not a readable Parquet file ({error}).") from error
    return list(_checked((f"{path} row {index}", value) for index, value in enumerate(values)))


def _from_dataset(source: str, column: str | None) -> list[str]:
    datasets = import_extra("datasets", "Reading prompts from data sets")
    name, _, split = source.removeprefix(DATASET).partition(":")
    split = split or "train"
    try:
        if (pathlib.Path(name) / "dataset_info.json").is_file():
            data = datasets.load_from_disk(name)  # one split, as `save_to_disk` leaves it
        else:
            data = datasets.load_dataset(name, split=split)
    except Exception as error:  # every loader of that library has errors of its own
        raise ValueError(f"datasets cannot load {name!r}, split {split!r}: {error}") from error
    key = choose_column(data.column_names, source, column)
    return list(_checked((f"{source} row {index}", value) for index, value in enumerate(data[key])))


def _prompt_in(value: Any, place: str, column: str | None) -> str:
    if isinstance(value, dict):
        value = value[choose_column(list(value), place, column)]
    return next(_checked([(place, value)]))


def choose_column(names: Sequence[str], source: str, column: str | None) -> str:
    """The column with the prompts.

    Raises:
        ValueError: if it cannot be told, or does not exist; lists the columns.
    """
    if column is not None:
        if column in names:
            return column
    else:
        known = {name.lower(): name for name in reversed(names)}
        for name in _COLUMNS:
            if name in known:
                return known[name]
        if len(names) == 1:
            return names[0]
    listed = ", ".join(names) or "no columns"
    missing = f"no column {column!r}" if column is not None else f"no column named {', '.join(_COLUMNS)}"
    raise ValueError(f"{source} has {missing}; it has {listed}. Name the column of the prompts.")


def _checked(values: Iterable[tuple[str, Any]]) -> Iterator[str]:
    for place, value in values:
        if not isinstance(value, str):
            raise ValueError(f"{place} holds {value!r}, which is not a string. Give a string per prompt.")
        if not value.strip():
            raise ValueError(f"{place} holds an empty prompt. Remove it, or write what to draw.")
        yield value.strip()


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{name} is not UTF-8 (line {line}: {error.reason}). Save it as UTF-8 text.") from error
