# SPDX-License-Identifier: Apache-2.0
"""Loading the models that judge pictures, by folder or Hub id, with one clear error."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any


def load_model(loader: Any, checkpoint: str | os.PathLike[str], role: str) -> Any:
    """`loader.from_pretrained(checkpoint)` of a model, with all of its weights, in evaluation mode.

    Args:
        loader (`type`): a model class of transformers.
        checkpoint (`str` or `os.PathLike`): local folder or Hub id.
        role (`str`): what the checkpoint is needed for, for the message.

    Raises:
        ValueError: if it is not there, incomplete or of another task; names the checkpoint and the remedy.
    """
    with _explained(checkpoint, role):
        model, loaded = loader.from_pretrained(checkpoint, output_loading_info=True)
        # transformers fills what the checkpoint of another task lacks with random weights, and only warns.
        parameters = dict(model.named_parameters())
        lacking = sorted(name for name in loaded["missing_keys"] if name in parameters)
        if lacking:
            raise ValueError(
                f"it lacks {len(lacking)} of the {len(parameters)} weights of a {type(model).__name__}, e.g. "
                f"{lacking[0]}: it is of another task."
            )
    return model.eval()


def load_part(loader: Any, checkpoint: str | os.PathLike[str], role: str) -> Any:
    """`loader.from_pretrained(checkpoint)` of a config, tokenizer or processor; see [`load_model`]."""
    with _explained(checkpoint, role):
        return loader.from_pretrained(checkpoint)


@contextlib.contextmanager
def _explained(checkpoint: str | os.PathLike[str], role: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, AttributeError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"The {role} {os.fspath(checkpoint)!r} cannot be loaded: {reason} Give a local folder that holds the "
            "model with its processor, or a Hub id while the Hub can be reached."
        ) from error
