# SPDX-License-Identifier: Apache-2.0
"""`push_to_hub`: packed weights, card, reports and an optional bfloat16 copy to the Hugging Face Hub."""

import dataclasses
import logging
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo, ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..backend import below_compiled_wrappers
from ..files import read_json, temporary_folder, write_json, write_text
from ..files.destinations import is_local_path
from .base_card import BaseCard, read_base_card
from .card import make_card
from .dense import write_dense_copy
from .reports import CALIBRATION, DISTILLATION, EVALUATION, SHEET, WEIGHTS_KEY, Reports, read_reports
from .snippets import LOADER, has_loader, loader_text
from .source import CARD, DENSE, Source, read_source, stage
from .upload import upload


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn

logger = logging.getLogger(__name__)
WORK = "diffusers-ternary-push-"
"""How the folders for what is sent begin, among the temporary files."""


@dataclasses.dataclass(frozen=True)
class Publication:
    """Everything that a push would send, on disk.

    Args:
        source ([`Source`]): the packed weights.
        base ([`BaseCard`]): what the base model's card says.
        card (`ModelCard`): README.md.
        files (`Mapping[str, Path]`): path in the repository → file.
    """

    source: Source
    base: BaseCard
    card: ModelCard
    files: Mapping[str, pathlib.Path]

    @property
    def message(self) -> str:
        """Of the commit."""
        return f"Packed weights of {self.base.repo_id}"

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(path.stat().st_size for path in self.files.values())


@below_compiled_wrappers
def push_to_hub(
    pipeline_or_model: "DiffusionPipeline | nn.Module | str | os.PathLike[str]",
    repo_id: str,
    *,
    base_model: str,
    report: Any = None,
    calibration: Any = None,
    distillation: Any = None,
    include_dequantized: bool = False,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Publishes packed weights with a model card that says what was measured, and nothing else.

    Everything is checked before the Hub is written to, and arrives in one commit: a repository never shows half of
    a push. An interrupted push goes on where it was when it is repeated.

    Args:
        pipeline_or_model (`DiffusionPipeline`, `nn.Module`, `str` or `os.PathLike`):
            A quantized pipeline or model, or the folder that it was saved to. A README.md in the folder is taken as
            the card's text; its metadata are completed and checked.
        repo_id (`str`): `namespace/name`; made if it does not exist.
        base_model (`str`): Hub id of the float model. License and pipeline tag come from its card.
        report ([`EvaluationResult`], `dict` or path, *optional*):
            What `evaluate` found, or the folder of its report. Default: evaluation.json of the folder, if any.
        calibration ([`CalibrationReport`], `dict` or path, *optional*): default: calibration.json of the folder.
        distillation ([`DistillReport`], `dict` or path, *optional*): default: distill.json of the folder.
        include_dequantized (`bool`):
            Add a bfloat16 copy of the packed models in `bf16/`, which stock diffusers loads without this package. It
            is written to the folder for temporary files first.
        private (`bool`, *optional*): visibility of a new repository.
        token (`str`, *optional*): default: the stored one.
        revision (`str`, *optional*): branch to push to, made if it does not exist, or `refs/pr/N`.
        create_pr (`bool`): open a pull request instead.

    Returns:
        `huggingface_hub.CommitInfo`: with `commit_url` and, for pull requests, `pr_url`.

    Example:

    ```python
    diffusers_ternary.push_to_hub(
        "flux-ternary", "me/flux-ternary", base_model="black-forest-labs/FLUX.1-dev", report="report", create_pr=True
    )
    ```

    Raises:
        ValueError: if the source is not packed, incomplete or damaged, or a report or card contradicts it; for a
            repository that cannot be used. Nothing is sent then.
        PermissionError, OSError, ConnectionError: see [`explained_hub_errors`].
    """
    check_target(repo_id, revision=revision, create_pr=create_pr)
    base = read_base_card(base_model, token=token)
    with temporary_folder(WORK) as work:
        publication = prepare(
            pipeline_or_model,
            repo_id,
            base,
            work,
            report=report,
            calibration=calibration,
            distillation=distillation,
            include_dequantized=include_dequantized,
        )
        return upload(
            publication.files,
            repo_id,
            message=publication.message,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
        )


def check_target(repo_id: str, *, revision: str | None, create_pr: bool) -> None:
    """What can be known of the destination without asking the Hub.

    Raises:
        ValueError: for a `repo_id` that is not namespace/name, or `create_pr` together with a revision.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id={repo_id!r} is not a Hub id ({error}). Use namespace/name.") from error
    if "/" not in repo_id:
        # The card shows how to load the repository, so its whole name must be known.
        raise ValueError(f"repo_id={repo_id!r} has no namespace. Use namespace/name, e.g. your user name.")
    if create_pr and revision is not None:
        raise ValueError(
            f"create_pr=True opens a pull request against the main branch, so revision={revision!r} has no meaning. "
            "Give one of the two (revision='refs/pr/N' adds to an open pull request)."
        )


def prepare(
    pipeline_or_model: Any,
    repo_id: str,
    base: BaseCard,
    work: pathlib.Path,
    *,
    report: Any = None,
    calibration: Any = None,
    distillation: Any = None,
    include_dequantized: bool = False,
) -> Publication:
    """Checks the source and writes everything that goes with it into `work`; see [`push_to_hub`] for the rest.

    Nothing is sent.
    """
    source = read_source(stage(pipeline_or_model, work / "model"))
    generated = work / "generated"
    generated.mkdir()
    reports = read_reports(source, generated, report=report, calibration=calibration, distillation=distillation)
    card = make_card(source, repo_id, base, reports, include_dequantized=include_dequantized)
    warning = base.license_warning()
    if warning is not None:
        logger.warning("%s", warning)
    files = {**source.files, **dict(_report_files(source, reports, generated))}
    if has_loader(source):
        files[LOADER] = generated / LOADER
        write_text(files[LOADER], loader_text(source.class_name))
    if include_dequantized:
        for name, model in source.packed.items():
            for path in write_dense_copy(model, generated / DENSE / name):
                files[path.relative_to(generated).as_posix()] = path
    for name, path in files.items():
        # Hosts write into a configuration where on this machine it was loaded from.
        settings = read_json(path) if path.name in ("config.json", "model_index.json") else None
        if settings is not None and is_local_path(settings.get("_name_or_path")):
            files[name] = generated / "settings" / name
            files[name].parent.mkdir(parents=True, exist_ok=True)
            write_json(files[name], {**settings, "_name_or_path": base.repo_id})
    files[CARD] = generated / CARD
    write_text(files[CARD], str(card))
    return Publication(source, base, card, files)


def _report_files(source: Source, reports: Reports, folder: pathlib.Path) -> Iterator[tuple[str, pathlib.Path]]:
    evaluation = reports.evaluation
    contents = {CALIBRATION: reports.calibration, DISTILLATION: reports.distillation}
    if evaluation is not None:
        contents[EVALUATION] = {WEIGHTS_KEY: source.weights_sha256, **evaluation.data}
        if evaluation.contact_sheet is not None:
            yield SHEET, evaluation.contact_sheet
    for name, content in contents.items():
        if content is not None:
            write_json(folder / name, content)
            yield name, folder / name
