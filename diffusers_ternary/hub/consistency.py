# SPDX-License-Identifier: Apache-2.0
"""Reports and cards that speak of other weights than these are refused."""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..format import LayerSpec
from .base_card import BaseCard, Terms
from .records import WEIGHTS_KEY, Evaluation
from .source import Source


CARD_KEY = "diffusers_ternary"
"""Entry of a card's metadata that names the weights it was written for."""

TEXT_KEY = "text_sha256"

_OTHER = "It was made from other weights than these; give the report of these, or leave it out."


def check_reports(
    source: Source,
    *,
    evaluation: Evaluation | None,
    calibration: Mapping[str, Any] | None,
    distillation: Mapping[str, Any] | None,
) -> None:
    """Compares what the reports say of the weights with the weights.

    Raises:
        ValueError: if they contradict each other.
    """
    pipeline = None if evaluation is None else evaluation.data.get("pipeline")
    if source.is_pipeline and pipeline and pipeline != source.class_name:
        raise ValueError(f"report: it compares pipelines of class {pipeline}, not {source.class_name}. {_OTHER}")
    measured = None if evaluation is None else evaluation.data.get(WEIGHTS_KEY)
    if measured not in (None, source.weights_sha256):
        raise ValueError(f"report: it measured weights of hash {measured[:16]}…, not these. {_OTHER}")
    for argument, record in (("calibration", calibration), ("distillation", distillation)):
        if record is not None:
            _check_record(source, argument, record)


def _check_record(source: Source, argument: str, record: Mapping[str, Any]) -> None:
    bits = record.get("bits_per_weight")
    # With a size budget, layers that were kept count as well; the layers are compared one by one then.
    if (
        not record.get("sensitivity")
        and isinstance(bits, (int, float))
        and not math.isclose(bits, source.bits_per_weight, rel_tol=1e-4)
    ):
        raise ValueError(
            f"{argument}: it says {bits:.4f} bits per weight, the files hold {source.bits_per_weight:.4f}. {_OTHER}"
        )
    specs = _specs_by_name(source)
    for layer in record.get("layers") or []:
        name = str(layer.get("name"))
        # A model on its own does not know what its pipeline calls it.
        spec = specs.get(name) or specs.get(f".{name.partition('.')[2]}")
        if spec is None:
            raise ValueError(f"{argument}: the files hold no packed layer {name}. {_OTHER}")
        stored = {"hadamard": 0, "rank": 0, **spec.to_json()}
        wrong = {key: layer[key] for key in stored if key in layer and layer[key] != stored[key]}
        if wrong:
            found = {key: stored[key] for key in wrong}
            raise ValueError(f"{argument}: {name} is described as {wrong}, but the files hold {found}. {_OTHER}")


def _specs_by_name(source: Source) -> dict[str, LayerSpec]:
    return {f"{part.name}.{name}": spec for part in source.packed for name, spec in part.layout.layers.items()}


def weights_entry(source: Source) -> dict[str, Any]:
    """What a card's metadata says of the weights it was written for."""
    return {
        "format_version": source.format_version,
        "bits_per_weight": round(source.bits_per_weight, 4),
        "weights_sha256": source.weights_sha256,
    }


def text_sha256(text: str) -> str:
    """Hash of a card's text, blank lines at its ends left out."""
    return hashlib.sha256(text.strip().encode()).hexdigest()


def is_generated(card: ModelCard) -> bool:
    """Whether a card's text is as an earlier push wrote it; a new one may then take its place."""
    return _entry(card).get(TEXT_KEY) == text_sha256(card.text)


def _entry(card: ModelCard) -> Mapping[str, Any]:
    entry = card.data.get(CARD_KEY)
    return entry if isinstance(entry, Mapping) else {}


def merge_own_card(card: ModelCard, data: ModelCardData, source: Source, base: BaseCard) -> ModelCard:
    """Completes the metadata of a card that somebody wrote, and leaves its text alone.

    Raises:
        ValueError: if an entry contradicts the weights, the base model or the results that were given.
    """
    own, ours = card.data.to_dict(), data.to_dict()
    bases = own.get("base_model")
    listed = bases if isinstance(bases, list) else [bases]
    if bases and base.repo_id not in listed:
        raise _contradiction("base_model", bases, f"base_model={base.repo_id!r} was given")
    for key in ("base_model_relation", "library_name"):
        if own.get(key) not in (None, ours.get(key)):
            raise _contradiction(key, own[key], f"these weights are {ours.get(key)!r}")
    for key, value in weights_entry(source).items():
        told = _entry(card).get(key, value)
        if told != value:
            raise _contradiction(f"{CARD_KEY}.{key}", told, f"the files give {value!r}")
    if base.licence.terms is Terms.NON_COMMERCIAL and own.get("license") not in (None, base.licence.id):
        raise _contradiction("license", own["license"], f"the base model has {base.licence}")
    for told in card.data.get("eval_results") or []:
        for measured in data.get("eval_results") or []:
            if told.is_equal_except_value(measured) and told.metric_value != measured.metric_value:
                raise _contradiction(
                    f"model-index {told.metric_type}", told.metric_value, f"the report gives {measured.metric_value}"
                )
    for key in data.__dict__:
        if key == "tags":
            card.data["tags"] = list(dict.fromkeys([*(card.data.get("tags") or []), *(data.get("tags") or [])]))
        elif key == "eval_results" or key == CARD_KEY:
            card.data[key] = data.get(key) or card.data.get(key)
        elif card.data.get(key) is None:
            card.data[key] = data.get(key)
    return card


def _contradiction(field: str, value: object, truth: str) -> ValueError:
    return ValueError(
        f"README.md says {field}: {json.dumps(value, default=str)}, but {truth}. Correct the card, or delete it to "
        "get a new one."
    )
