# SPDX-License-Identifier: Apache-2.0
"""What the Hub's refusals mean, and what to do about them."""

import contextlib
from collections.abc import Iterator

from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

from ..backend.compat import HubTransportError


_NOTHING_COMMITTED = "Nothing was committed."
# Kind and text of the error for an answer of the Hub.
_BY_STATUS: dict[int, tuple[type[Exception], str]] = {
    401: (
        PermissionError,
        "The Hub does not accept the token for {repo}: {said} Log in with `hf auth login`, or pass a token with write "
        "access.",
    ),
    403: (
        PermissionError,
        "The token may not write to {repo}: {said} Use a token with write access, another namespace, or "
        "create_pr=True to propose the change.",
    ),
    404: (ValueError, "{repo} does not exist, or the token may not see it: {said}"),
    409: (ValueError, "{repo} cannot be used: {said} Choose another name."),
    412: (OSError, "{repo} was changed by somebody else meanwhile: {said} Nothing was committed. Push again."),
}
_QUOTA = ("storage limit", "quota", "too large", "payment required")


@contextlib.contextmanager
def explained_hub_errors(repo_id: str) -> Iterator[None]:
    """Turns the client's errors into built-in ones that name the repository and the remedy.

    Raises:
        PermissionError: without a valid token, or with one that may not write.
        ValueError: for a repository or revision that does not exist, or a name that is taken.
        OSError: for an upload that exceeds the storage quota, or a conflict with another commit.
        ConnectionError: if the Hub cannot be reached, or keeps failing.
    """
    try:
        yield
    except (HubTransportError, RuntimeError) as error:
        found = _hub_error(error)
        if found is None:
            raise
        raise _explained(found, repo_id) from error


def _hub_error(error: BaseException | None) -> Exception | None:
    # Errors of a file's upload come wrapped in a RuntimeError.
    while error is not None:
        if isinstance(error, HubTransportError):
            return error
        error = error.__cause__
    return None


def _explained(error: Exception, repo_id: str) -> Exception:
    again = f"{_NOTHING_COMMITTED} Run the same push again: large files that arrived are not sent a second time."
    if not isinstance(error, HfHubHTTPError):
        return ConnectionError(f"The Hub cannot be reached ({error or type(error).__name__}). {again}")
    status, said = error.response.status_code, _said(error)
    if status in (413, 507) or (status in (402, 403) and any(mark in said.lower() for mark in _QUOTA)):
        return OSError(
            f"The upload to {repo_id} is larger than the storage that is left there: {said} {_NOTHING_COMMITTED} "
            "Leave out the dequantized copy, free storage, or choose another namespace."
        )
    if isinstance(error, RevisionNotFoundError):
        return ValueError(f"{repo_id} has no such revision: {said} Name an existing branch or refs/pr/N.")
    if status >= 500 or status in (408, 429):
        return ConnectionError(f"The Hub answered {status} again and again: {said} {again}")
    kind, text = _BY_STATUS.get(status, (OSError, "The Hub refused the push to {repo} ({status}): {said}"))
    return kind(text.format(repo=repo_id, status=status, said=said))


def _said(error: HfHubHTTPError) -> str:
    text = error.server_message or str(error).partition("\n")[0]
    text = " ".join(text.split())
    return text if text.endswith((".", "!", "?")) else f"{text}."
