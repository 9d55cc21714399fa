# SPDX-License-Identifier: Apache-2.0
"""Loading the models that judge pictures, by folder or Hub id, with one clear error."""

import os
from typing import Any


def load_part(loader: Any, checkpoint: str | os.PathLike[str], role: str) -> Any:
    """`loader.from_pretrained(checkpoint)`.

    Args:
        loader (`type`): a class of transformers with `from_pretrained`.
        checkpoint (`str` or `os.PathLike`): local folder or Hub id.
        role (`str`): what the checkpoint is needed for, for the message.

    Raises:
        ValueError: if it is not there, incomplete or of another kind; names the checkpoint and the remedy.
    """
    try:
        return loader.from_pretrained(checkpoint)
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"The {role} {os.fspath(checkpoint)!r} cannot be loaded: {reason} Give a local folder that holds the "
            "model with its processor, or a Hub id while the Hub can be reached."
        ) from error
