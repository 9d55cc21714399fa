# SPDX-License-Identifier: Apache-2.0
"""Finds the packed denoiser that is to be exported."""

import pathlib

from ..backend.config import TernaryConfig
from ..backend.packed_folder import PackedFolder
from ..backend.sources import selected_components
from ..files import read_json


def open_packed(path: pathlib.Path) -> PackedFolder:
    """Opens a packed denoiser: its folder, or the pipeline's that it is in.

    Raises:
        ValueError: if there is none, or it is damaged.
        FileNotFoundError: if the path does not exist.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. Give the folder of a packed model.")
    index = read_json(path / "model_index.json")
    if index is not None:
        (name, *others) = selected_components(index, TernaryConfig(), source=path)
        if others:
            raise ValueError(f"{path} has several denoisers ({name}, {', '.join(others)}). Give the folder of one.")
        path = path / name
    return PackedFolder.open(path)
