# SPDX-License-Identifier: Apache-2.0
"""The model card: metadata and text, rendered from facts that were read from files and reports."""

import importlib.resources

from huggingface_hub import ModelCard, ModelCardData

from .base_card import BaseCard
from .consistency import CARD_KEY, TEXT_KEY, text_sha256, weights_entry
from .facts import CardFacts
from .records import Evaluation
from .source import Source


# A link to model_cards/quantized_model.md.jinja, so that installed packages carry the template too.
_TEMPLATE = "quantized_model.md.jinja"
_TASK = "text-to-image"  # what evaluate compares


def card_data(source: Source, repo_id: str, base: BaseCard, evaluation: Evaluation | None) -> ModelCardData:
    """The card's metadata: what is known, and nothing else.

    Args:
        source ([`Source`]): the weights.
        repo_id (`str`): where they go.
        base ([`BaseCard`]): of the float model.
        evaluation ([`Evaluation`], *optional*): becomes `model-index`.
    """
    task = base.pipeline_tag or (_TASK if evaluation is not None else None)
    tags = ["ternary" if source.ternary_layers else "int8", "quantized", "diffusers-ternary"]
    data = ModelCardData(
        base_model=base.repo_id,
        base_model_relation="quantized",
        library_name=source.library,
        pipeline_tag=base.pipeline_tag,
        license=base.licence.id,
        license_name=base.licence.name,
        license_link=base.licence.link,
        language=base.language,
        tags=tags,
        model_name=repo_id.rpartition("/")[2] if evaluation is not None else None,
        eval_results=evaluation.to_eval_results(task or _TASK) if evaluation is not None else None,
    )
    data[CARD_KEY] = weights_entry(source)
    return data


def render_card(data: ModelCardData, facts: CardFacts) -> ModelCard:
    """Fills the template.

    Args:
        data (`ModelCardData`): see [`card_data`].
        facts ([`CardFacts`]): what the text says.
    """
    template = importlib.resources.files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8")
    card = ModelCard.from_template(data, template_str=template, facts=facts)
    card.data[CARD_KEY][TEXT_KEY] = text_sha256(card.text)
    return card
