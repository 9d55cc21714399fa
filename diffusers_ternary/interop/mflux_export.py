# SPDX-License-Identifier: Apache-2.0
"""`export_mflux`: a packed denoiser in the form that mflux saves and loads, for Apple's MLX."""

import collections
import contextlib
import dataclasses
import functools
import logging
import os
import pathlib
import shutil
from collections.abc import Iterator

import numpy as np
import torch
from safetensors.torch import save_file

from ..backend.folder import refuse_links
from ..backend.packed_folder import PackedFolder
from ..files import write_json
from ..files.destinations import output_folder
from ..format import Int8Spec, LayerSpec
from ..progress import Bar
from .export import MERGE, ONLY_CODES, ExportReport, ReadBack, block_scales, export, more_than_codes
from .mflux_import import INDEX, MfluxFiles
from .mflux_names import mflux_module, mflux_name
from .mlx_affine import GROUP_SIZES, affine_group_size, encode_affine


logger = logging.getLogger(__name__)
# What mflux writes into its own files, and looks for when it loads.
_METADATA = {"quantization_level": "2", "mflux_version": "0.24.0"}
_MAX_SHARD = 2_000_000_000


def export_mflux(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    max_shard_size: int = _MAX_SHARD,
    merge: bool = False,
    overwrite: bool = False,
) -> ExportReport:
    """Writes a packed FLUX.1, 2 or 3, Z-Image or Qwen-Image for mflux, reads it again and compares every weight.

    Ternary layers become MLX's 2-bit affine weights, int8 layers its 8-bit ones, both exact; everything else stays as
    it is. Of a pipeline, the other components are copied, so that the result is what `mflux-generate --model` takes.

    Args:
        source (`str` or `PathLike`): packed model folder, or the pipeline folder it is in.
        destination (`str` or `PathLike`): folder to write: of the pipeline, or of the denoiser alone.
        max_shard_size (`int`, *optional*, defaults to 2 GB): bytes of tensors per file.
        merge (`bool`, *optional*, defaults to `False`): store layers that MLX cannot hold as bfloat16, in which mflux
            computes, rotation and low-rank correction merged into them.
        overwrite (`bool`, *optional*): replace the destination.

    Returns:
        [`ExportReport`].

    Raises:
        ValueError: if the source is not a packed model that mflux runs, holds symbolic links, or a layer has a
            rotation, column scales, a low-rank correction, or groups that MLX does not know.
        FileExistsError: if the destination exists, or holds what is not a result of an earlier run.
    """
    form = _Mflux(pathlib.Path(source), max_shard_size, merge)
    report = export(form, source, destination, overwrite=overwrite)
    if report.inexact:
        logger.warning("%d layers are stored as bfloat16; %s.", len(report.inexact), report.proof())
    return report


def check_mflux(model: PackedFolder, *, merge: bool = False) -> None:
    """Checks that a packed model has this form.

    Raises:
        ValueError: names the layer and the remedy.
    """
    for name in sorted(model.names()):
        mflux_module(model.class_name, name.rpartition(".")[0])
        spec = model.spec(name)
        if spec is not None and affine_group_size(spec) is None and not merge:
            reason, way_out = more_than_codes(spec), ONLY_CODES
            if not reason:
                reason = "MLX knows groups of 32, 64 and 128 input features, which do not fit into its groups"
                way_out = f"Choose a group size that is a multiple of 32, or {MERGE}."
            if spec.in_features % min(GROUP_SIZES):
                reason = f"its {spec.in_features} input features are not a multiple of 32"
                way_out = f"Name the layer in modules_to_not_convert, or {MERGE}."
            raise ValueError(f"{name.removesuffix('.weight')} cannot be exported to mflux: {reason}. {way_out}")


@dataclasses.dataclass(frozen=True)
class _Mflux:
    """The form of mflux's folders; see [`export_mflux`]."""

    root: pathlib.Path
    max_shard_size: int
    may_round: bool

    @contextlib.contextmanager
    def output(self, destination: pathlib.Path, source: pathlib.Path, *, overwrite: bool) -> Iterator[pathlib.Path]:
        refuse_links(source)  # other components are copied
        with output_folder(destination, sources=[source], overwrite=overwrite) as folder:
            yield folder

    def architecture(self, model: PackedFolder) -> str:
        return model.class_name

    def files(self, model: PackedFolder, place: pathlib.Path) -> list[pathlib.Path]:
        return list(self._part(model, place).glob("*.safetensors"))

    def check(self, model: PackedFolder) -> None:
        check_mflux(model, merge=self.may_round)

    def write(self, model: PackedFolder, place: pathlib.Path) -> dict[str, int]:
        part = self._part(model, place)
        self._copy_rest(model, place)
        part.mkdir(parents=True, exist_ok=True)
        write_json(part / "config.json", model.config)
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(self._shards(model)):
            save_file(shard, part / f"{number}.safetensors", metadata=_METADATA)
            weight_map |= dict.fromkeys(shard, f"{number}.safetensors")
        write_json(part / INDEX, {"metadata": _METADATA, "weight_map": weight_map})
        return dict(collections.Counter(_kind(model.spec(name)) for name in model.names()))

    def read_back(self, model: PackedFolder, place: pathlib.Path) -> Iterator[ReadBack]:
        files = MfluxFiles(self._part(model, place))
        for name in sorted(model.names()):
            renamed, exact = mflux_name(model.class_name, name), model.dequantize(name).numpy()
            stored = files.read(renamed, columns=exact.shape[-1])
            yield ReadBack(renamed, exact, functools.partial(_rows, stored))

    def _part(self, model: PackedFolder, place: pathlib.Path) -> pathlib.Path:
        return place / model.path.relative_to(self.root)

    def _shards(self, model: PackedFolder) -> Iterator[dict[str, torch.Tensor]]:
        shard: dict[str, torch.Tensor] = {}
        for name, tensor in _tensors(model):
            if shard and sum(part.nbytes for part in shard.values()) + tensor.nbytes > self.max_shard_size:
                yield shard
                shard = {}
            shard[name] = tensor.contiguous()
        yield shard

    def _copy_rest(self, model: PackedFolder, place: pathlib.Path) -> None:
        """The other components of a pipeline, and what describes it; nothing of the packed weights."""

        def left_out(directory: str, names: list[str]) -> set[str]:
            hidden = {name for name in names if name.startswith(".")}
            if pathlib.Path(directory) != model.path:
                return hidden
            return hidden | {name for name in names if ".safetensors" in name or name == "config.json"}

        shutil.copytree(self.root, place, ignore=left_out, dirs_exist_ok=True)


def _rows(stored: torch.Tensor, rows: slice) -> np.ndarray:
    values: np.ndarray = stored[rows].float().numpy()
    return values


def _kind(spec: LayerSpec | None) -> str:
    if spec is None or affine_group_size(spec) is None:
        return "float"
    return "8-bit" if isinstance(spec, Int8Spec) else "2-bit"


def _tensors(model: PackedFolder) -> Iterator[tuple[str, torch.Tensor]]:
    for name in Bar(sorted(model.names()), "Exporting"):
        spec, renamed = model.spec(name), mflux_name(model.class_name, name)
        size = None if spec is None else affine_group_size(spec)
        if spec is None or size is None:
            yield renamed, model.read(name) if spec is None else model.dequantize(name, torch.bfloat16)
            continue
        scales = block_scales(spec, model.group_scales(name), size).contiguous()
        encoded = encode_affine(model.codes(name), scales, 8 if isinstance(spec, Int8Spec) else 2)
        # MLX reads uint32; torch's own has hardly any operations.
        yield renamed, encoded.weight.view(torch.uint32)
        yield f"{renamed.removesuffix('.weight')}.scales", encoded.scales
        yield f"{renamed.removesuffix('.weight')}.biases", encoded.biases
