# SPDX-License-Identifier: Apache-2.0
"""Where the trained models of Scenes are: in the repository, not in the wheel, which they would triple."""

from __future__ import annotations

import os
from pathlib import Path


FOLDER_VARIABLE = "DIFFUSERS_TERNARY_SCENES"
TEACHERS = ("flux", "sana")
JUDGE = "judge.safetensors"
_CHECKOUT = Path(__file__).parents[3] / "examples" / "scenes" / "models"


def scenes_file(name: str) -> Path:
    """The folder of a teacher (``"flux"``, ``"sana"``) or the file of the judge (``"judge.safetensors"``).

    Looked for in the folder that the environment variable ``DIFFUSERS_TERNARY_SCENES`` names, if it is set, otherwise
    in ``examples/scenes/models`` of the checkout that the package runs from.

    Raises:
        ValueError: If ``name`` is none of these.
        FileNotFoundError: If it is not there; the message says how to get it.
    """
    if name not in (*TEACHERS, JUDGE):
        raise ValueError(f"Unknown model of Scenes {name!r}; choose from {', '.join((*TEACHERS, JUDGE))}.")
    named = os.environ.get(FOLDER_VARIABLE)
    folder = Path(named) if named else _CHECKOUT
    path = folder / name
    if not (path / "model_index.json" if name in TEACHERS else path).is_file():
        raise FileNotFoundError(
            f"{path} is not there. The models of Scenes are not part of the installed package: clone the "
            f"diffusers-ternary repository and set {FOLDER_VARIABLE} to its examples/scenes/models, or train them "
            "with examples/scenes/rebuild.sh, which writes them there."
        )
    return path
