# SPDX-License-Identifier: Apache-2.0
"""README.md: written from files and reports; or that of the user, completed and compared with the weights."""

import hashlib
import importlib.resources
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from .base_card import BaseCard, Terms
from .page import page
from .reports import Reports
from .source import Source


# A link to model_cards/quantized_model.md.jinja, so that installed packages carry the template too.
_TEMPLATE = "quantized_model.md.jinja"
_TASK = "text-to-image"  # what evaluate compares
_KEY, _TEXT_KEY = "diffusers_ternary", "text_sha256"


def make_card(
    source: Source, repo_id: str, base: BaseCard, reports: Reports, *, include_dequantized: bool
) -> ModelCard:
    """The card of a push: a new one, or the user's own with its metadata completed.

    Args:
        source ([`Source`]): the weights; its card, if it is not one that an earlier push wrote, is the user's.
        repo_id (`str`): where they go.
        base ([`BaseCard`]): of the float model.
        reports ([`Reports`]): what was measured, and how the weights were made.
        include_dequantized (`bool`): whether the repository gets a bfloat16 copy.

    Raises:
        ValueError: if the user's card cannot be read, or contradicts the weights, the base model or the results.
    """
    data = _card_data(source, repo_id, base, reports)
    own = None if source.card is None else _read_card(source.card)
    if own is not None and _entry(own).get(_TEXT_KEY) != _text_sha256(own):
        return _merge(own, data, base)
    template = importlib.resources.files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8")
    values = page(source, repo_id, base, reports, include_dequantized=include_dequantized)
    card = ModelCard.from_template(data, template_str=template, **values)
    card.data[_KEY][_TEXT_KEY] = _text_sha256(card)
    return card


def _card_data(source: Source, repo_id: str, base: BaseCard, reports: Reports) -> ModelCardData:
    """The card's metadata: what is known, and nothing else."""
    evaluation = reports.evaluation
    task = base.pipeline_tag or _TASK
    data = ModelCardData(
        base_model=base.repo_id,
        base_model_relation="quantized",
        library_name=source.library,
        pipeline_tag=base.pipeline_tag,
        license=base.license.id,
        license_name=base.license.name,
        license_link=base.license.link,
        language=base.language,
        tags=["ternary" if source.ternary_layers else "int8", "quantized", "diffusers-ternary"],
        model_name=repo_id.rpartition("/")[2] if evaluation is not None else None,
        eval_results=evaluation.to_eval_results(task) if evaluation is not None else None,
    )
    data[_KEY] = {
        "format_version": source.format_version,
        "bits_per_weight": round(source.bits_per_weight, 4),
        "weights_sha256": source.weights_sha256,
    }
    return data


def _read_card(path: pathlib.Path) -> ModelCard:
    try:
        return ModelCard.load(path, ignore_metadata_errors=True)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path}: the metadata block cannot be read ({error}). Correct or delete the card."
        ) from error


def _text_sha256(card: ModelCard) -> str:
    """Hash of a card's text, blank lines at its ends left out: tells whether somebody edited it."""
    return hashlib.sha256(card.text.strip().encode()).hexdigest()


def _entry(card: ModelCard) -> Mapping[str, Any]:
    """What a card's metadata say of the weights it was written for."""
    entry = card.data.get(_KEY)
    return entry if isinstance(entry, Mapping) else {}


def _merge(card: ModelCard, data: ModelCardData, base: BaseCard) -> ModelCard:
    """Completes the metadata of a card that somebody wrote, and leaves its text alone."""
    own, ours = card.data.to_dict(), data.to_dict()
    bases = own.get("base_model")
    if bases and base.repo_id not in (bases if isinstance(bases, list) else [bases]):
        raise _contradiction("base_model", bases, f"base_model={base.repo_id!r} was given")
    for key in ("base_model_relation", "library_name"):
        if own.get(key) not in (None, ours.get(key)):
            raise _contradiction(key, own[key], f"these weights are {ours.get(key)!r}")
    for key, value in data[_KEY].items():
        told = _entry(card).get(key, value)
        if told != value:
            raise _contradiction(f"{_KEY}.{key}", told, f"the files give {value!r}")
    if base.license.terms is Terms.NON_COMMERCIAL and own.get("license") not in (None, base.license.id):
        raise _contradiction("license", own["license"], f"the base model has {base.license}")
    for told in card.data.get("eval_results") or []:
        for measured in data.get("eval_results") or []:
            if told.is_equal_except_value(measured) and told.metric_value != measured.metric_value:
                raise _contradiction(
                    f"model-index {told.metric_type}", told.metric_value, f"the report gives {measured.metric_value}"
                )
    for key, value in data.__dict__.items():
        if key == "tags":
            card.data[key] = list(dict.fromkeys([*(card.data.get(key) or []), *value]))
        elif card.data.get(key) is None or (value and key in ("eval_results", _KEY)):
            card.data[key] = value
    return card


def _contradiction(field: str, value: object, truth: str) -> ValueError:
    return ValueError(
        f"README.md says {field}: {json.dumps(value, default=str)}, but {truth}. Correct the card, or delete it to "
        "get a new one."
    )
