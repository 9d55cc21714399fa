# SPDX-License-Identifier: Apache-2.0
"""One atomic commit of a set of files, with huggingface_hub's client."""

import logging
import pathlib
import re
import time
from collections.abc import Iterable, Mapping

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from ..backend.compat import HubTransportError
from .errors import explained_hub_errors
from .reports import CALIBRATION, DISTILLATION, EVALUATION, SHEET
from .snippets import LOADER
from .source import DENSE


logger = logging.getLogger(__name__)
GENERATED = (EVALUATION, CALIBRATION, DISTILLATION, SHEET, LOADER)
"""Files beside the weights that a push writes, or removes when they would tell of other weights."""

_WEIGHTS = re.compile(r"(?P<checkpoint>.+?)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")
_ATTEMPTS = 3
_TRANSIENT = (408, 429, 500, 502, 503, 504)


def upload(
    files: Mapping[str, pathlib.Path],
    repo_id: str,
    *,
    message: str,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Makes the repository hold `files`, in one commit.

    Large files go first, each by its content: after an interruption, those that arrived are not sent again. The
    commit comes last, so a repository never shows half of a push. Weights, indices and reports of an earlier push
    that are not among `files` are deleted in the same commit: a loader would prefer some of them.

    Args:
        files (`Mapping[str, Path]`): path in the repository → file.
        repo_id (`str`): the repository; made if it does not exist.
        message (`str`): of the commit.
        private (`bool`, *optional*): of a new repository; an existing one must agree with `True`.
        token (`str`, *optional*): default: the stored one.
        revision (`str`, *optional*): branch, made if it does not exist, or `refs/pr/N`.
        create_pr (`bool`): propose the commit instead.

    Returns:
        `huggingface_hub.CommitInfo`

    Raises:
        PermissionError, ValueError, OSError, ConnectionError: see [`explained_hub_errors`].
    """
    api = HfApi(token=token)
    with explained_hub_errors(repo_id):
        name = _prepare_repo(api, repo_id, private=private)
        if revision is not None:
            _prepare_branch(api, name, revision)
        present = api.list_repo_files(name, revision=revision)
        stale = stale_files(present, files)
        for path in stale:
            logger.info("%s: %s is of an earlier push and goes", name, path)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationDelete(path) for path in stale),
            *(CommitOperationAdd(path, str(file)) for path, file in sorted(files.items())),
        ]
        return _commit(api, name, operations, message=message, revision=revision, create_pr=create_pr)


def stale_files(present: Iterable[str], files: Mapping[str, pathlib.Path]) -> list[str]:
    """Files of a repository that an earlier push left and that do not belong to this one.

    Shards and indices of the same checkpoints, and what pushes generate; everything else is somebody's own.
    """

    def checkpoint(path: str) -> str | None:
        match = _WEIGHTS.fullmatch(path)
        return None if match is None else match["checkpoint"]

    written = {checkpoint(path) for path in files} - {None}

    def replaced(path: str) -> bool:
        return checkpoint(path) in written or path in GENERATED or path.startswith(f"{DENSE}/")

    return sorted(path for path in present if path not in files and replaced(path))


def _prepare_repo(api: HfApi, repo_id: str, *, private: bool | None) -> str:
    name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    try:
        info = api.model_info(name)
    except RepositoryNotFoundError as error:
        # The Hub said that the name exists; it is not a model then.
        kinds = [kind for kind in ("dataset", "space") if api.repo_exists(name, repo_type=kind)]
        raise ValueError(
            f"{name} is taken by {f'a {kinds[0]}' if kinds else 'something that is not a model'}. Choose another name."
        ) from error
    if private and not info.private:
        raise ValueError(
            f"private=True, but {name} exists and is public. Make it private in its settings first, or choose another "
            "name."
        )
    return name


def _prepare_branch(api: HfApi, name: str, revision: str) -> None:
    try:
        api.model_info(name, revision=revision)
    except RevisionNotFoundError:
        if revision.startswith("refs/"):
            raise
        api.create_branch(name, branch=revision, exist_ok=True)


def _commit(
    api: HfApi,
    name: str,
    operations: list[CommitOperationAdd | CommitOperationDelete],
    *,
    message: str,
    revision: str | None,
    create_pr: bool,
) -> CommitInfo:
    # The client retries every request but this last one. A pull request would be opened twice if only the answer
    # of the first attempt was lost; the same commit twice does no harm.
    attempts = 1 if create_pr else _ATTEMPTS
    for attempt in range(1, attempts + 1):
        try:
            return api.create_commit(name, operations, commit_message=message, revision=revision, create_pr=create_pr)
        except HubTransportError as error:
            refused = isinstance(error, HfHubHTTPError) and error.response.status_code not in _TRANSIENT
            if attempt == attempts or refused:
                raise
            logger.warning("%s: the commit failed (%s); trying again", name, str(error).partition("\n")[0])
            time.sleep(2.0 ** (attempt - 1))
    raise AssertionError("unreachable")
