# SPDX-License-Identifier: Apache-2.0
"""Finds the packed denoiser that is to be exported."""

import pathlib

from ..backend.packed_folder import PackedFolder


def open_packed(path: pathlib.Path) -> PackedFolder:
    """Opens a packed denoiser: its folder, or the pipeline's that it is in.

    Raises:
        ValueError: if there is none, or it is damaged.
        FileNotFoundError: if the path does not exist.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. Give the folder of a packed model.")
    if (path / "model_index.json").is_file():
        (name, *others) = pipeline_components(path, None)
        if others:
            raise ValueError(f"{path} has several denoisers ({name}, {', '.join(others)}). Give the folder of one.")
        path = path / name
    return PackedFolder.open(path)
