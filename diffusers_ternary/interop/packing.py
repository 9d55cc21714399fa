# SPDX-License-Identifier: Apache-2.0
"""Models in other formats to packed folders: what is ternary is packed, the rest is kept. Nothing is rounded."""

import collections
import dataclasses
import logging
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..backend.config import RECOVER, TernaryConfig
from ..backend.folder import refuse_links
from ..backend.packed_folder import PackedFolder
from ..backend.packed_writer import PackedFolderWriter
from ..backend.plan import float_layers
from ..backend.sources import selected_components
from ..files import read_json
from ..files.destinations import output_folder
from ..format import LayerSpec, TernarySpec
from ..layers import reason_not_to_pack
from ..progress import Bar
from ..ternarize import TernaryFit, TernaryWeight, recover, ternary_fit
from .empty_model import empty_model
from .foreign_model import ForeignModel, check_names
from .open_foreign import open_foreign


logger = logging.getLogger(__name__)
# Rows that say how much of an ordinary weight is ternary; ternary ones are read completely.
_SAMPLE_ROWS = 64
# Written anew, or about weights that are no longer there (gemlite).
_CONFIG_FILES = ("config.json", "quantization_config.json")
_WEIGHT_FILES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".gguf")


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """One converted model.

    Args:
        name (`str`): the component of the pipeline, or empty for a single model.
        format (`str`): what the source was.
        layers (`dict[str, LayerSpec]`): packed layers.
        misfits (`dict[str, TernaryFit]`): layers that are not ternary and were kept.
        source_bytes (`int`): of the tensors as they were stored.
        bytes (`int`): of the tensors as they are stored now.
        packed_bytes (`int`): of these, what the packed layers take.
        verified (`bool`): whether what was written was read again and compared with the source.
    """

    name: str
    format: str
    layers: dict[str, LayerSpec]
    misfits: dict[str, TernaryFit]
    source_bytes: int
    bytes: int
    packed_bytes: int
    verified: bool

    @property
    def almost(self) -> dict[str, TernaryFit]:
        """Kept layers that are ternary for the most part: look at these."""
        return {name: fit for name, fit in self.misfits.items() if fit.almost}

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per packed weight, scales included."""
        weights = sum(spec.weights for spec in self.layers.values())
        return 8 * self.packed_bytes / weights if weights else 0.0

    def summary(self) -> str:
        """A few lines for people."""
        sizes = collections.Counter(_grouping(spec) for spec in self.layers.values())
        kinds = ", ".join(f"{count} with {grouping}" for grouping, count in sizes.most_common())
        name = f"{self.name}: " if self.name else ""
        packed = f" ({kinds}) at {self.bits_per_weight:.3f} bits per weight" if self.layers else ""
        lines = [
            f"{name}{self.format}: {len(self.layers)} ternary layers packed{packed}; {len(self.misfits)} layers that "
            "are not ternary kept."
        ]
        if self.verified:
            lines.append("Read again and compared: every weight equals the source.")
        lines += [f"{name} is almost ternary ({fit}) and was kept." for name, fit in self.almost.items()]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return {
            "name": self.name,
            "format": self.format,
            "layers": {name: spec.to_json() for name, spec in self.layers.items()},
            "misfits": {name: dataclasses.asdict(fit) for name, fit in self.misfits.items()},
            "source_bytes": self.source_bytes,
            "bytes": self.bytes,
            "bits_per_weight": self.bits_per_weight,
            "verified": self.verified,
        }


@dataclasses.dataclass(frozen=True)
class _Part:
    """A model to convert and the folder it goes to, relative to the destination."""

    folder: str
    model: ForeignModel
    layers: dict[str, str]  # tensor name → module name


def pack(
    root: pathlib.Path,
    destination: str | os.PathLike[str],
    *,
    components: Sequence[str] | None,
    config: str | os.PathLike[str] | None,
    variant: str | None,
    max_shard_size: int,
    verify: bool,
    overwrite: bool,
) -> list[ConversionReport]:
    """Packs a model or pipeline on this machine; arguments, result and errors as of [`convert`]."""
    if root.is_dir():
        refuse_links(root)
    index = read_json(root / "model_index.json")
    names = [""]
    if index is not None:
        names = selected_components(index, TernaryConfig(components=components), source=root)
    # Everything that headers can tell is checked here, before the destination is touched.
    parts = [_open_part(root, name, config=config, variant=variant) for name in names]
    with output_folder(destination, sources=[root, config], overwrite=overwrite) as folder:
        reports = [_convert_part(part, folder / part.folder, max_shard_size, verify) for part in parts]
        if not any(report.layers for report in reports):
            raise ValueError(_nothing_ternary(root, reports))
        _copy_rest(root, folder, {part.folder for part in parts})
    for report in reports:
        for name, fit in report.almost.items():
            logger.warning("%s is almost ternary (%s): kept.", name, fit)
    return reports


def _open_part(root: pathlib.Path, name: str, *, config: str | os.PathLike[str] | None, variant: str | None) -> _Part:
    path = root / name
    model = open_foreign(path, config=None if config is None else pathlib.Path(config), variant=variant)
    empty = empty_model(model.config, model.shapes, source=path)
    check_names(empty, model.shapes, source=str(path))
    layers = {f"{module}.weight": module for module, _ in _packable(empty)}
    return _Part(name, model, {tensor: module for tensor, module in layers.items() if tensor in model.shapes})


def _packable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in float_layers(model):
        if reason_not_to_pack(module) is None:
            yield name, module


def _convert_part(part: _Part, folder: pathlib.Path, max_shard_size: int, verify: bool) -> ConversionReport:
    folder.mkdir(exist_ok=True)
    writer = PackedFolderWriter(folder, weights_name=part.model.weights_name, max_shard_size=max_shard_size)
    misfits: dict[str, TernaryFit] = {}
    source_bytes = 0
    for name, tensor in Bar(part.model.items(), "Packing", total=len(part.model.shapes)):
        source_bytes += tensor.numel() * tensor.element_size()
        module = part.layers.get(name)
        matrix = tensor.flatten(1) if module is not None else tensor
        recovered = recover(matrix) if module is not None else None
        if module is not None and isinstance(recovered, TernaryWeight):
            writer.add_layer(module, recovered)
            continue
        if module is not None:
            misfits[module] = recovered if isinstance(recovered, TernaryFit) else _sampled_fit(matrix)
        writer.add_tensor(name, tensor)
    size = writer.finish(part.model.config, _config_of(writer.layers) if writer.layers else None)
    if verify and writer.layers:
        _prove(part.model, folder)
    return ConversionReport(
        name=part.folder,
        format=part.model.format,
        layers=writer.layers,
        misfits=misfits,
        source_bytes=source_bytes,
        bytes=size,
        packed_bytes=writer.layer_bytes,
        verified=verify,
    )


def _sampled_fit(matrix: torch.Tensor) -> TernaryFit:
    rows = torch.linspace(0, matrix.shape[0] - 1, min(matrix.shape[0], _SAMPLE_ROWS)).long()
    return ternary_fit(matrix[rows])


def _config_of(layers: Mapping[str, LayerSpec]) -> TernaryConfig:
    sizes = collections.Counter(spec.group_size for spec in layers.values() if isinstance(spec, TernarySpec))
    return TernaryConfig(rounding=RECOVER, group_size=sizes.most_common(1)[0][0], scale_layout="group")


def _nothing_ternary(root: pathlib.Path, reports: Sequence[ConversionReport]) -> str:
    fits = {name: fit for report in reports for name, fit in report.misfits.items()}
    nearest = max(fits.items(), key=lambda item: item[1].fraction, default=None)
    hint = f" The nearest is {nearest[0]}: {nearest[1]}." if nearest else ""
    return (
        f"{root} has no ternary layer ({len(fits)} looked at).{hint} convert never rounds: use `diffusers-ternary "
        "quantize` or `calibrate` to make a ternary model of it."
    )


def _prove(model: ForeignModel, folder: pathlib.Path) -> None:
    """Reads the written files and compares every tensor with the source.

    Raises:
        RuntimeError: if one differs, which would be a bug.
    """
    written = PackedFolder.open(folder)
    for name, tensor in Bar(model.items(), "Comparing", total=len(model.shapes)):
        if written.spec(name) is None:
            equal = _same_bits(written.read(name), tensor)
        else:
            equal = torch.equal(written.dequantize(name, tensor.dtype).reshape(tensor.shape), tensor)
        if not equal:
            raise RuntimeError(f"{name} differs from the source after packing. This is a bug; please report it.")


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def _copy_rest(root: pathlib.Path, folder: pathlib.Path, converted: set[str]) -> None:
    """Everything that is not a weight of a converted model: other components, tokenizers, schedulers, licenses."""
    if root.is_file():
        return

    def written_here(directory: str, names: list[str]) -> set[str]:
        place = pathlib.Path(directory).relative_to(root).as_posix()
        hidden = {name for name in names if name.startswith(".")}
        if ("" if place == "." else place) not in converted:
            return hidden
        return hidden | {name for name in names if name in _CONFIG_FILES or name.endswith(_WEIGHT_FILES)}

    shutil.copytree(root, folder, ignore=written_here, dirs_exist_ok=True)


def _grouping(spec: LayerSpec) -> str:
    if isinstance(spec, TernarySpec) and spec.groups > 1:
        return f"group size {spec.group_size}"
    return "one scale per row"
