# SPDX-License-Identifier: Apache-2.0
"""What a model card says: the values of its template, gathered from files and reports; nothing is estimated."""

import collections
import math
from collections.abc import Iterator
from typing import Any

from ..backend.checkpoint import owner
from ..interop.contents import pattern_of
from .base_card import HUB, BaseCard, Terms
from .dense import dense_bytes
from .reports import Evaluation, Reports
from .snippets import dense_usage, has_loader, loader_usage, usage
from .source import Source


_KEPT_ROWS = 12
# Cells of a table, formatted.
Row = tuple[str, ...]


def page(
    source: Source, repo_id: str, base: BaseCard, reports: Reports, *, include_dequantized: bool
) -> dict[str, Any]:
    """Values of `quantized_model.md.jinja`; what is `None` or empty vanishes.

    Args:
        source ([`Source`]): the weights.
        repo_id (`str`): where they go.
        base ([`BaseCard`]): of the float model.
        reports ([`Reports`]): what was measured, and how the weights were made.
        include_dequantized (`bool`): whether the repository gets a bfloat16 copy.
    """
    kept = [row for _, row in sorted(_kept_rows(source), key=lambda row: -row[0])]
    rest = sum(int(row[1]) for row in kept[_KEPT_ROWS:])
    dense_size = sum(dense_bytes(model) for model in source.packed.values())
    return {
        "title": repo_id.rpartition("/")[2],
        "bits_per_weight": f"{source.bits_per_weight:.3f}",
        "ternary_layers": source.ternary_layers,
        "usage": usage(source, repo_id, base, reports.evaluation),
        "loader": loader_usage(repo_id) if has_loader(source) else None,
        "dense": dense_usage(source, repo_id, base.repo_id) if include_dequantized else None,
        "dense_size": _bytes(dense_size),
        "sizes": list(_size_rows(source)),
        "kinds": list(_kind_rows(source)),
        "quality": _quality(reports.evaluation),
        "adapters": _adapters(reports),
        "recipes": reports.recipes,
        "kept": kept[:_KEPT_ROWS],
        "kept_rest": f"{_tensors(rest)} in smaller groups" if rest else None,
        "limits": list(_limits(reports)),
        "license": _license(base),
    }


def _size_rows(source: Source) -> Iterator[Row]:
    """Component, stored, in 16 bits, ratio."""
    sizes = [(part.name, part.bytes, part.bytes_16bit) for part in source.components]
    if len(sizes) > 1:
        sizes.append(("**total**", sum(size for _, size, _ in sizes), sum(size for _, _, size in sizes)))
    for name, stored, sixteen_bit in sizes:
        yield name, _bytes(stored), _bytes(sixteen_bit), f"{sixteen_bit / stored:.2f}x" if stored else ""


def _kind_rows(source: Source) -> Iterator[Row]:
    """Of packed components: component, kind, layers or tensors, weights, bits per weight."""
    for part in source.components:
        if part.format_version is None:
            continue
        by_kind: dict[tuple[bool, str], list[tuple[int, int, int]]] = collections.defaultdict(list)
        for row in part.rows:
            by_kind[row.shape is None, row.kind].append((row.count, row.weights, row.bytes))
        total = max(sum(row.weights for row in part.rows), 1)
        for (kept, kind), rows in sorted(by_kind.items()):
            count, weights, size = (sum(values) for values in zip(*rows, strict=True))
            label, number = (f"kept in {kind}", _tensors(count)) if kept else (kind, str(count))
            yield part.name, label, number, f"{weights:,} ({weights / total:.1%})", f"{8 * size / max(weights, 1):.3f}"


def _kept_rows(source: Source) -> Iterator[tuple[int, Row]]:
    """Weights in all; name pattern, count, shape and dtype of tensors that were left alone."""
    for component, model in source.packed.items():
        counts: collections.Counter[tuple[str, tuple[int, ...], str]] = collections.Counter()
        for name, stored in model.tensors.items():
            # Biases and norms are kept everywhere; what a reader looks for are the matrices.
            if len(stored.shape) > 1 and owner(name, model.layout.layers) is None:
                counts[pattern_of(name), stored.shape, stored.dtype] += 1
        for (pattern, shape, dtype), count in counts.items():
            name = f"{component}.{pattern}" if len(source.packed) > 1 else pattern
            row = (f"`{name}`", str(count), " x ".join(map(str, shape)), dtype.lower())
            yield count * math.prod(shape), row


def _quality(evaluation: Evaluation | None) -> dict[str, Any] | None:
    """How it was measured in a sentence; metric, this model, teacher, better; the contact sheet's path."""
    if evaluation is None or not evaluation.metrics:
        return None
    arguments = "".join(f", {name}={value!r}" for name, value in (evaluation.data.get("call_kwargs") or {}).items())
    count = len(evaluation.prompts)
    how = (
        f"{count} prompt{'s' if count != 1 else ''} (SHA-256 `{evaluation.prompts_sha256[:16]}…`), seeds "
        f"{min(evaluation.seeds)} to {max(evaluation.seeds)}{arguments}"
    )
    rows = [
        (metric.name, _number(metric.value), "" if metric.teacher is None else _number(metric.teacher), metric.better)
        for metric in evaluation.metrics
    ]
    sheet = evaluation.contact_sheet
    return {"how": how, "rows": rows, "sheet": None if sheet is None else sheet.name}


def _adapters(reports: Reports) -> str | None:
    """What was folded into the float model first, in a sentence."""
    named = [
        f"`{each['name']}` at scale {each['scale']} (SHA-256 `{str(each['sha256'])[:16]}…`)"
        for each in reports.adapters
    ]
    if not named:
        return None
    return (
        f"The float model is the base model with LoRA weights folded in: {', '.join(named)}. This model draws like "
        "that fine-tune; the licenses of the LoRA weights hold for it as well."
    )


def _limits(reports: Reports) -> Iterator[str]:
    if reports.evaluation is None:
        yield "**Quality was not measured** for this card. Compare with the float model before you rely on it."
    elif reports.evaluation.prompts_sha256 in {recipe.prompts_sha256 for recipe in reports.recipes}:
        yield "Quality was measured on **the prompts that the weights were made with**; others may score lower."
    if not reports.recipes:
        yield (
            "No report of a calibration or distillation came with these weights. Weights that were only rounded to "
            "ternary spoil the pictures of most models."
        )
    yield "LoRA weights are saved with `save_lora_weights`, never inside this checkpoint."
    yield "Limits and biases of the base model hold here too; see its card."


def _license(base: BaseCard) -> str:
    license, repo = base.license, f"[{base.repo_id}]({HUB}/{base.repo_id})"
    if license.terms is Terms.UNKNOWN and not license.name:
        return (
            f"These weights were made from {repo} and are under its license, which could not be read when this card "
            "was written."
        )
    shown = f"[{license}]({license.link})" if license.link else str(license)
    text = f"The license of the base model holds for these weights: {shown}, from {repo}."
    if license.terms is Terms.NON_COMMERCIAL:
        text += " **It restricts commercial use.**"
    elif license.terms is Terms.CONDITIONAL:
        text += " It sets conditions on use."
    return text


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
