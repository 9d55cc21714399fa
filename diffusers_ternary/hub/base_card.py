# SPDX-License-Identifier: Apache-2.0
"""What the card of the base model says: license, pipeline tag, languages."""

import dataclasses
import enum
import logging

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..backend.compat import HubTransportError


logger = logging.getLogger(__name__)

HUB = "https://huggingface.co"
# https://huggingface.co/docs/hub/repositories-licenses; "other" has a name and a text of its own.
_FREE = frozenset(
    {
        *("agpl-3.0", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0"),
        *("cc-by-sa-4.0", "cc0-1.0", "gpl-3.0", "isc", "lgpl-3.0", "mit", "mpl-2.0", "unlicense"),
    }
)
_CONDITIONAL = ("openrail", "creativeml", "bigscience-", "bigcode-", "llama", "gemma")
_NON_COMMERCIAL = ("non-commercial", "noncommercial", "-nc-", "-nc", "research", "community")


class Terms(enum.Enum):
    """What a license allows, as far as its name tells."""

    FREE = "free"
    CONDITIONAL = "conditional"
    NON_COMMERCIAL = "non-commercial"
    UNKNOWN = "unknown"


@dataclasses.dataclass(frozen=True)
class License:
    """The license fields of a card."""

    id: str | None = None
    name: str | None = None
    link: str | None = None

    @property
    def terms(self) -> Terms:
        """What it allows, judged by its name."""
        words = " ".join(filter(None, (self.id, self.name))).lower().replace(" ", "-").replace("_", "-")
        if not words or self.id == "unknown":
            return Terms.UNKNOWN
        if any(mark in words for mark in _NON_COMMERCIAL):
            return Terms.NON_COMMERCIAL
        if self.id in _FREE:
            return Terms.FREE
        return Terms.CONDITIONAL if any(mark in words for mark in _CONDITIONAL) else Terms.UNKNOWN

    def __str__(self) -> str:
        return self.name or self.id or "unknown"


@dataclasses.dataclass(frozen=True)
class BaseCard:
    """What was read of the base model's card.

    Args:
        repo_id (`str`): of the base model.
        license ([`License`]): empty fields if the card could not be read or names none.
        pipeline_tag (`str`, *optional*): e.g. `"text-to-image"`.
        language (`str` or `list[str]`, *optional*): as in the card.
        problem (`str`, *optional*): why the card could not be read.
    """

    repo_id: str
    license: License = License()
    pipeline_tag: str | None = None
    language: str | list[str] | None = None
    problem: str | None = None

    def license_warning(self) -> str | None:
        """What a publisher must know, in one sentence; `None` if the license is a free one."""
        terms = self.license.terms
        if terms is Terms.NON_COMMERCIAL:
            return (
                f"The license of {self.repo_id} ({self.license}) restricts commercial use. It holds for these weights "
                "too: read it before you publish them."
            )
        if terms is Terms.CONDITIONAL:
            return f"The license of {self.repo_id} ({self.license}) sets conditions on use; they hold here too."
        if terms is Terms.UNKNOWN:
            reason = f" ({self.problem})" if self.problem else ""
            return (
                f"The license of {self.repo_id} is not known{reason}. Look it up before you publish weights that were "
                "made from it."
            )
        return None


def read_base_card(repo_id: str, *, token: str | None = None) -> BaseCard:
    """Reads the base model's card from the Hub; without one, license and tag stay unknown.

    Raises:
        ValueError: if `repo_id` is not a Hub id.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"base_model={repo_id!r} is not a Hub id ({error}). Name the float model that was quantized, e.g. "
            "black-forest-labs/FLUX.1-dev."
        ) from error
    try:
        data = ModelCard.load(repo_id, token=token, ignore_metadata_errors=True).data
    except (HubTransportError, OSError, ValueError) as error:
        return BaseCard(repo_id, problem=f"its card cannot be read: {_first_line(error)}")
    link = data.get("license_link")
    if isinstance(link, str) and "://" not in link:
        link = f"{HUB}/{repo_id}/blob/main/{link}"
    license = data.get("license")
    if isinstance(license, list):
        license = license[0] if license else None
    return BaseCard(
        repo_id,
        license=License(license, data.get("license_name"), link),
        pipeline_tag=data.get("pipeline_tag"),
        language=data.get("language"),
        problem=None if license else "its card names none",
    )


def _first_line(error: Exception) -> str:
    return next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), type(error).__name__)
