# SPDX-License-Identifier: Apache-2.0
"""What a model card says, gathered from the files and the reports; nothing is estimated."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

from ..backend.checkpoint import owner
from .base_card import HUB, BaseCard, Terms
from .dense import dense_bytes
from .loader import has_loader
from .recipes import Recipe
from .records import Evaluation
from .source import PackedModel, Source
from .usage import dense_usage, loader_usage, usage


_KEPT_ROWS = 12


@dataclasses.dataclass(frozen=True)
class SizeRow:
    """A component's size, formatted."""

    name: str
    stored: str
    sixteen_bit: str
    ratio: str


@dataclasses.dataclass(frozen=True)
class KindRow:
    """Layers of a packed component that are stored in the same way, formatted."""

    component: str
    kind: str
    count: str
    weights: str
    bits: str


@dataclasses.dataclass(frozen=True)
class KeptRow:
    """Tensors of a packed component that were left alone, by name pattern, shape and dtype."""

    name: str
    count: int
    shape: str
    dtype: str


@dataclasses.dataclass(frozen=True)
class MetricRow:
    """A measured value, formatted."""

    name: str
    value: str
    teacher: str
    better: str


@dataclasses.dataclass(frozen=True)
class Quality:
    """What was measured, and how.

    Args:
        how (`str`): prompts, seeds and call arguments in a sentence.
        rows (`tuple[MetricRow, ...]`): the values.
        sheet (`str`, *optional*): path of the contact sheet in the repository.
    """

    how: str
    rows: tuple[MetricRow, ...]
    sheet: str | None


@dataclasses.dataclass(frozen=True)
class CardFacts:
    """What the template shows; `None` and empty sections vanish.

    Args:
        title (`str`), base_model (`str`), bits_per_weight (`str`), ternary_layers (`int`): of the head.
        usage (`str`): code that loads the repository.
        loader (`str`, *optional*): code that does so without the import line.
        dense (`str`, *optional*): code that loads the bfloat16 copy.
        dense_size (`str`, *optional*): what that copy takes.
        sizes, kinds, kept: tables; `kept_rest` says what the last one leaves out.
        quality ([`Quality`], *optional*): of an evaluation.
        recipes (`tuple[Recipe, ...]`): of calibration and distillation.
        limits (`tuple[str, ...]`): what to know before use.
        licence (`str`): a paragraph.
    """

    title: str
    base_model: str
    bits_per_weight: str
    ternary_layers: int
    usage: str
    loader: str | None
    dense: str | None
    dense_size: str | None
    sizes: tuple[SizeRow, ...]
    kinds: tuple[KindRow, ...]
    kept: tuple[KeptRow, ...]
    kept_rest: str | None
    quality: Quality | None
    recipes: tuple[Recipe, ...]
    limits: tuple[str, ...]
    licence: str


def gather_facts(
    source: Source,
    repo_id: str,
    base: BaseCard,
    *,
    evaluation: Evaluation | None,
    recipes: tuple[Recipe, ...],
    include_dequantized: bool,
) -> CardFacts:
    """Reads everything the card says.

    Args:
        source ([`Source`]): the weights.
        repo_id (`str`): where they go.
        base ([`BaseCard`]): of the float model.
        evaluation ([`Evaluation`], *optional*): what was measured.
        recipes (`tuple[Recipe, ...]`): how the weights were made.
        include_dequantized (`bool`): whether the repository gets a bfloat16 copy.
    """
    kept = sorted(_kept_rows(source.packed), key=lambda row: -row[0])
    rest = sum(row.count for _, row in kept[_KEPT_ROWS:])
    return CardFacts(
        title=repo_id.rpartition("/")[2],
        base_model=base.repo_id,
        bits_per_weight=f"{source.bits_per_weight:.3f}",
        ternary_layers=source.ternary_layers,
        usage=usage(source, repo_id, base, evaluation),
        loader=loader_usage(repo_id) if has_loader(source) else None,
        dense=dense_usage(source, repo_id, base.repo_id) if include_dequantized else None,
        dense_size=_bytes(sum(dense_bytes(part) for part in source.packed)) if include_dequantized else None,
        sizes=tuple(_size_rows(source)),
        kinds=tuple(_kind_rows(source)),
        kept=tuple(row for _, row in kept[:_KEPT_ROWS]),
        kept_rest=f"{_tensors(rest)} in smaller groups" if rest else None,
        quality=_quality(evaluation),
        recipes=recipes,
        limits=tuple(_limits(evaluation, recipes)),
        licence=_licence(base),
    )


def _size_rows(source: Source) -> Iterator[SizeRow]:
    for part in source.components:
        yield _size_row(part.name, part.bytes, part.bytes_16bit)
    if len(source.components) > 1:
        sizes = [(part.bytes, part.bytes_16bit) for part in source.components]
        yield _size_row("**total**", sum(size for size, _ in sizes), sum(size for _, size in sizes))


def _size_row(name: str, stored: int, sixteen_bit: int) -> SizeRow:
    return SizeRow(name, _bytes(stored), _bytes(sixteen_bit), f"{sixteen_bit / stored:.2f}x" if stored else "")


def _kind_rows(source: Source) -> Iterator[KindRow]:
    for part in source.components:
        if part.format_version is None:
            continue
        by_kind: dict[tuple[bool, str], list[tuple[int, int, int]]] = collections.defaultdict(list)
        for row in part.rows:
            by_kind[row.shape is None, row.kind].append((row.count, row.weights, row.bytes))
        total = sum(row.weights for row in part.rows)
        for (kept, kind), rows in sorted(by_kind.items()):
            count, weights, size = (sum(values) for values in zip(*rows, strict=True))
            share = f"{weights:,} ({weights / max(total, 1):.1%})"
            label = f"kept in {kind}" if kept else kind
            yield KindRow(
                part.name, label, _tensors(count) if kept else str(count), share, f"{8 * size / max(weights, 1):.3f}"
            )


def _kept_rows(models: tuple[PackedModel, ...]) -> Iterator[tuple[int, KeptRow]]:
    several = len(models) > 1
    for model in models:
        counts: collections.Counter[tuple[str, tuple[int, ...], str]] = collections.Counter()
        for name, stored in model.tensors.items():
            # Biases and norms are kept everywhere; what a reader looks for are the matrices.
            if len(stored.shape) > 1 and owner(name, model.layout.layers) is None:
                pattern = re.sub(r"\.\d+(?=\.|$)", ".*", name)
                counts[pattern, stored.shape, stored.dtype] += 1
        for (pattern, shape, dtype), count in counts.items():
            name = f"{model.name}.{pattern}" if several else pattern
            row = KeptRow(name, count, " x ".join(map(str, shape)), dtype.lower())
            yield count * math.prod(shape), row


def _quality(evaluation: Evaluation | None) -> Quality | None:
    if evaluation is None or not evaluation.metrics:
        return None
    rows = tuple(
        MetricRow(
            metric.name,
            _number(metric.value),
            "" if metric.teacher is None else _number(metric.teacher),
            metric.better,
        )
        for metric in evaluation.metrics
    )
    arguments = "".join(f", {name}={value!r}" for name, value in (evaluation.data.get("call_kwargs") or {}).items())
    count = len(evaluation.prompts)
    how = (
        f"{count} prompt{'s' if count != 1 else ''} (SHA-256 `{evaluation.prompts_sha256[:16]}…`), seeds "
        f"{min(evaluation.seeds)} to {max(evaluation.seeds)}{arguments}"
    )
    return Quality(how, rows, None if evaluation.contact_sheet is None else evaluation.contact_sheet.name)


def _limits(evaluation: Evaluation | None, recipes: tuple[Recipe, ...]) -> Iterator[str]:
    if evaluation is None:
        yield "**Quality was not measured** for this card. Compare with the float model before you rely on it."
    elif evaluation.prompts_sha256 in {recipe.prompts_sha256 for recipe in recipes}:
        yield "Quality was measured on **the prompts that the weights were made with**; others may score lower."
    if not recipes:
        yield (
            "No report of a calibration or distillation came with these weights. Weights that were only rounded to "
            "ternary spoil the pictures of most models."
        )
    yield (
        "`.to(dtype)` and `.half()` raise in diffusers for quantized models: pass `dtype` while loading. LoRA weights "
        "are saved with `save_lora_weights`, never inside this checkpoint."
    )
    yield "Limits and biases of the base model hold here too; see its card."


def _tensors(count: int) -> str:
    return f"{count} tensor{'s' if count != 1 else ''}"


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.1f}"


def _bytes(count: float) -> str:
    for unit, digits in (("B", 0), ("kB", 1), ("MB", 1)):
        if count < 1000:
            return f"{count:,.{digits}f} {unit}"
        count /= 1000
    return f"{count:,.2f} GB"


def _licence(base: BaseCard) -> str:
    """The licence section."""
    licence = base.licence
    if licence.terms is Terms.UNKNOWN and not licence.name:
        return (
            f"These weights were made from [{base.repo_id}]({HUB}/{base.repo_id}) and are under its "
            "licence, which could not be read when this card was written."
        )
    shown = f"[{licence}]({licence.link})" if licence.link else str(licence)
    text = (
        f"The licence of the base model holds for these weights: {shown}, from [{base.repo_id}]({HUB}/{base.repo_id})."
    )
    if licence.terms is Terms.NON_COMMERCIAL:
        text += " **It restricts commercial use.**"
    elif licence.terms is Terms.CONDITIONAL:
        text += " It sets conditions on use."
    return text
