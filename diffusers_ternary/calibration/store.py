# SPDX-License-Identifier: Apache-2.0
"""Finished layers on disk, so that an interrupted calibration goes on where it stopped."""

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
from collections.abc import Iterator, Mapping

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..files import lock, new_file, parse_json_object, read_json, recover_contents, recover_folder, write_json
from ..files.seals import is_sealed, seal
from ..format import TernarySpec
from ..ternarize import TernaryWeight
from .report import LayerReport
from .solver import SolvedLayer


logger = logging.getLogger(__name__)
_METADATA_KEY = "diffusers_ternary_calibration"


@contextlib.contextmanager
def work_folder(folder: str | os.PathLike[str] | None) -> Iterator[None]:
    """Keeps other calibrations out of a folder of finished layers until the block ends.

    Raises:
        BlockingIOError: if one is using it.
    """
    if folder is None:
        yield
        return
    with lock(folder, "another calibration"):
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        recover_folder(folder)
        recover_contents(folder)
        yield


class LayerStore:
    """One file per finished layer, written atomically, with its name and a hash of all that is in it.

    What is damaged, of another layer or of another fingerprint is not read.

    Args:
        folder (`os.PathLike`, *optional*): where; `None` = nowhere: nothing is stored and nothing found.
        fingerprint (`str`): of everything the layers depend on, see [`fingerprint`].
    """

    def __init__(self, folder: str | os.PathLike[str] | None, fingerprint: str) -> None:
        self._folder = None if folder is None else pathlib.Path(folder)
        self._fingerprint = fingerprint

    def save(self, name: str, layer: SolvedLayer) -> None:
        """Stores a finished layer."""
        path = self._path(name)
        if path is None:
            return
        weight = layer.weight
        tensors = weight.tensors()
        if layer.bias_change is not None:
            tensors["bias_change"] = layer.bias_change
        record = {
            "layer": name,
            "fingerprint": self._fingerprint,
            "spec": dataclasses.asdict(weight.spec),
            "report": dataclasses.asdict(layer.report),
        }
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        with new_file(path) as temporary:
            save_file(tensors, temporary, metadata={_METADATA_KEY: json.dumps(seal(record, tensors))})

    def load(self, name: str) -> SolvedLayer | None:
        """A layer that an earlier run finished, or `None`."""
        path = self._path(name)
        if path is None or not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get(_METADATA_KEY, "")
                record = parse_json_object(text, source=path)
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError, ValueError) as error:
            logger.warning("%s cannot be read (%s); the layer is calibrated again.", path, error)
            return None
        if not is_sealed(record, tensors):
            logger.warning("%s is not as it was written; the layer is calibrated again.", path)
            return None
        if record["layer"] != name:
            logger.warning("%s is of the layer %s; the layer is calibrated again.", path, record["layer"])
            return None
        if record["fingerprint"] != self._fingerprint:
            logger.warning("%s is of other weights, prompts or settings; the layer is calibrated again.", path)
            return None
        weight = TernaryWeight.of_tensors(TernarySpec(**record["spec"]), tensors)
        report = LayerReport(**{**record["report"], "shape": tuple(record["report"]["shape"]), "resumed": True})
        return SolvedLayer(weight, tensors.get("bias_change"), report)

    def save_numbers(self, name: str, numbers: Mapping[str, float]) -> None:
        """Stores measurements under a name of their own."""
        if self._folder is None:
            return
        content = {"of": name, "fingerprint": self._fingerprint, "numbers": dict(numbers)}
        write_json(self._folder / f"{name}.json", seal(content))

    def load_numbers(self, name: str) -> dict[str, float]:
        """Measurements of an earlier run with the same fingerprint; else none."""
        if self._folder is None:
            return {}
        path = self._folder / f"{name}.json"
        try:
            content = read_json(path)
        except (OSError, ValueError) as error:
            logger.warning("%s cannot be read (%s); it is measured again.", path, error)
            return {}
        if content is None or content.get("fingerprint") != self._fingerprint:
            return {}
        if not is_sealed(content) or content.get("of") != name:
            logger.warning("%s is not as it was written; it is measured again.", path)
            return {}
        return dict(content["numbers"])

    def _path(self, name: str) -> pathlib.Path | None:
        return None if self._folder is None else self._folder / f"{name}.safetensors"
