# SPDX-License-Identifier: Apache-2.0
"""Where the trained models of Scenes are: in the repository, not in the wheel, which they would triple."""

from __future__ import annotations

import os
from pathlib import Path


FOLDER_VARIABLE = "DIFFUSERS_TERNARY_SCENES"
TEACHERS = ("flux", "sana")
VAE = "vae"
JUDGE = "judge.safetensors"
_MARKS = {**dict.fromkeys(TEACHERS, "model_index.json"), VAE: "config.json"}  # what a folder holds
_CHECKOUT = Path(__file__).parents[3] / "examples" / "scenes" / "models"


def scenes_file(name: str) -> Path:
    """The folder of a teacher (``"flux"``, ``"sana"``) or the autoencoder (``"vae"``), or the file of the judge.

    A teacher is a whole pipeline folder, to be loaded with ``dtype=torch.bfloat16``: its weights may be stored in 8
    bits, exactly as it computes with them. The judge is called ``"judge.safetensors"``.

    Looked for in the folder that the environment variable ``DIFFUSERS_TERNARY_SCENES`` names, if it is set, otherwise
    in ``examples/scenes/models`` of the checkout that the package runs from.

    Raises:
        ValueError: If ``name`` is none of these.
        FileNotFoundError: If it is not there; the message says how to get it.
    """
    if name not in (*_MARKS, JUDGE):
        raise ValueError(f"Unknown model of Scenes {name!r}; choose from {', '.join((*_MARKS, JUDGE))}.")
    named = os.environ.get(FOLDER_VARIABLE)
    folder = Path(named) if named else _CHECKOUT
    path = folder / name
    if not (path / _MARKS[name] if name in _MARKS else path).is_file():
        raise FileNotFoundError(
            f"{path} is not there. The models of Scenes are not part of the installed package: clone the "
            f"diffusers-ternary repository and set {FOLDER_VARIABLE} to its examples/scenes/models, or train them "
            "with examples/scenes/rebuild.sh, which writes them there."
        )
    return path
