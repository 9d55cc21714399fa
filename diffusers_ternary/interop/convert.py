# SPDX-License-Identifier: Apache-2.0
"""`convert`: ternary models of others, in whatever form they were published, to packed folders. Nothing is rounded."""

import collections
import contextlib
import dataclasses
import inspect
import logging
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers.utils.logging import tqdm
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from torch import nn

from ..backend import read_headers
from ..backend.checkpoint import load_tensor
from ..backend.config import RECOVER, TernaryConfig
from ..backend.folder import refuse_links
from ..backend.packed_writer import PackedFolderWriter
from ..backend.plan import float_layers
from ..backend.sources import selected_components, source_error
from ..files import read_json
from ..files.destinations import check_folder, output_folder
from ..format import LayerSpec, TernarySpec, expand_scales, unpack_base3
from ..layers import reason_not_to_pack
from ..ternarize import TernaryFit, TernaryWeight, recover, ternary_fit
from .empty_model import empty_model
from .foreign_model import ForeignModel, check_names
from .gguf_export import GgufReport, check_gguf_options, export_gguf
from .mflux_export import MfluxReport, export_mflux
from .open_foreign import open_foreign
from .report import ConversionReport


logger = logging.getLogger(__name__)
# Rows that say how much of an ordinary weight is ternary; ternary ones are read completely.
_SAMPLE_ROWS = 64
_CHUNK_WEIGHTS = 1 << 20
# Written anew, or said of weights that are no longer there (gemlite).
_CONFIG_FILES = ("config.json", "quantization_config.json")
_WEIGHT_FILES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".gguf")
_EXPORTS: dict[str, Callable[..., GgufReport | MfluxReport]] = {"gguf": export_gguf, "mflux": export_mflux}


@dataclasses.dataclass(frozen=True)
class _Part:
    """A model to convert and the folder it goes to, relative to the destination."""

    folder: str
    model: ForeignModel
    layers: dict[str, str]  # tensor name → module name


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    components: Sequence[str] | None = None,
    config: str | os.PathLike[str] | None = None,
    variant: str | None = None,
    max_shard_size: int = 10_000_000_000,
    verify: bool = True,
    overwrite: bool = False,
    to: str = "packed",
    **export_options: Any,
) -> list[ConversionReport] | GgufReport | MfluxReport:
    """Packs a ternary model that somebody else published, or exports a packed one to another runtime.

    With `to="gguf"` or `to="mflux"` the source is a packed denoiser, see [`export_gguf`] and [`export_mflux`], which
    take `export_options`. Otherwise the result is a packed folder that loads with `from_pretrained`:

    Reads "unpacked" (dequantized) checkpoints of diffusers and transformers, whole pipelines of them, Clark-style
    packs of Sana, 2-bit state dicts of gemlite and HQQ, and GGUF files of Flux and Stable Diffusion 3. Group sizes are
    found, not asked for. Layers that are not ternary are kept as they are, to the bit; nothing is ever rounded.

    Memory holds one tensor at a time. The destination appears only when it is complete.

    Args:
        source (`str` or `PathLike`): a folder, a file, or a Hub id.
        destination (`str` or `PathLike`): folder to write.
        components (`Sequence[str]`, *optional*): of a pipeline; default: those that denoise.
        config (`str` or `PathLike`, *optional*): a config.json, or the folder it is in, for formats without one.
        variant (`str`, *optional*): of the source's files, e.g. `"fp16"`.
        max_shard_size (`int`, *optional*): bytes per file.
        verify (`bool`, *optional*, defaults to `True`): read what was written again and compare all of it with
            the source.
        overwrite (`bool`, *optional*): replace the destination.
        to (`str`, *optional*, defaults to `"packed"`): `"packed"`, `"gguf"` or `"mflux"`.
        export_options (*optional*): of the export, e.g. `runtime="sdcpp-gpu"`.

    Returns:
        `list[ConversionReport]`, one for each model; of an export, its report.

    Raises:
        ValueError: if the source is not such a model, is damaged, belongs to another architecture, or holds no ternary
            layer.
        FileNotFoundError: if there is no such source.
        FileExistsError: if the destination exists, or holds what is not a result of an earlier run.
    """
    check_options(to, components=components, config=config, variant=variant, **export_options)
    if to != "packed":
        return _EXPORTS[to](_local(source), destination, overwrite=overwrite, **export_options)
    check_folder(destination, sources=[_cached(source), config], overwrite=overwrite)
    root = _local(source)
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


def check_options(
    to: str,
    *,
    components: Sequence[str] | None = None,
    config: str | os.PathLike[str] | None = None,
    variant: str | None = None,
    **export_options: Any,
) -> None:
    """Checks arguments of [`convert`] that are wrong whatever the source is.

    Raises:
        ValueError: for an unknown format, and for options that it does not have.
    """
    if to == "packed":
        if export_options:
            raise ValueError(f"{', '.join(export_options)} belong to an export: to='gguf' or to='mflux'.")
        return
    importing = {"components": components, "config": config, "variant": variant}
    given = [name for name, value in importing.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)} belong to packing a model, not to an export (to={to!r}).")
    if to not in _EXPORTS:
        raise ValueError(f"to={to!r} is not one of packed, {', '.join(_EXPORTS)}.")
    known = inspect.signature(_EXPORTS[to]).parameters
    unknown = [name for name in export_options if name not in known]
    if unknown:
        raise ValueError(f"An export to {to} has no {', '.join(unknown)}.")
    if to == "gguf":
        checked = ("runtime", "ternary_type", "fallback")
        check_gguf_options(**{name: value for name, value in export_options.items() if name in checked})


def _cached(source: str | os.PathLike[str]) -> pathlib.Path:
    """Where a source lies on this machine, if it does."""
    path = pathlib.Path(source)
    if not path.exists():
        with contextlib.suppress(HFValidationError, LocalEntryNotFoundError, OSError, ValueError):
            return pathlib.Path(snapshot_download(os.fspath(source), local_files_only=True))
    return path


def _local(source: str | os.PathLike[str]) -> pathlib.Path:
    path = pathlib.Path(source)
    if path.exists():
        return path
    text = os.fspath(source)
    if text.count("/") != 1 or path.suffix in (".gguf", ".safetensors"):
        raise FileNotFoundError(f"{source} does not exist. Give a folder, a file, or a Hub id (owner/name).")
    try:
        return pathlib.Path(snapshot_download(text))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise source_error(source, error) from error


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
    for name, tensor in tqdm(part.model.items(), total=len(part.model.shapes), desc="Packing", leave=False):
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
        _prove(part.model, folder, writer.layers)
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
    return TernaryConfig(rounding=RECOVER, group_size=sizes.most_common(1)[0][0], scales="group")


def _nothing_ternary(root: pathlib.Path, reports: Sequence[ConversionReport]) -> str:
    fits = {name: fit for report in reports for name, fit in report.misfits.items()}
    nearest = max(fits.items(), key=lambda item: item[1].fraction, default=None)
    hint = f" The nearest is {nearest[0]}: {nearest[1]}." if nearest else ""
    return (
        f"{root} has no ternary layer ({len(fits)} looked at).{hint} convert never rounds: use `diffusers-ternary "
        "quantize` or `calibrate` to make a ternary model of it."
    )


def _prove(model: ForeignModel, folder: pathlib.Path, layers: Mapping[str, LayerSpec]) -> None:
    """Reads the written files and compares every tensor with the source.

    Raises:
        RuntimeError: if one differs, which would be a bug.
    """
    _, stored = read_headers(sorted(folder.glob("*.safetensors")))

    def read(name: str) -> torch.Tensor:
        return load_tensor(stored[name], name)

    for name, tensor in tqdm(model.items(), total=len(model.shapes), desc="Comparing", leave=False):
        spec = layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if isinstance(spec, TernarySpec):
            layer = name.removesuffix(".weight")
            codes = unpack_base3(read(name), (spec.out_features, spec.in_features))
            equal = _same_values(codes, read(f"{layer}.weight_scale"), spec.group_size, tensor.flatten(1))
        else:
            equal = _same_bits(read(name), tensor)
        if not equal:
            raise RuntimeError(f"{name} differs from the source after packing. This is a bug; please report it.")


def _same_values(codes: torch.Tensor, scale: torch.Tensor, group_size: int, weight: torch.Tensor) -> bool:
    """Whether codes times scales, rounded to the dtype of `weight`, equal it; some rows at a time, to save memory."""
    rows = max(1, _CHUNK_WEIGHTS // weight.shape[1])
    for part, part_scale, dense in zip(codes.split(rows), scale.split(rows), weight.split(rows), strict=True):
        scales = expand_scales(part_scale.float(), group_size, weight.shape[1])
        if not torch.equal((part * scales).to(weight.dtype), dense):
            return False
    return True


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def _copy_rest(root: pathlib.Path, folder: pathlib.Path, converted: set[str]) -> None:
    """Everything that is not a weight of a converted model: other components, tokenizers, schedulers, licences."""
    if root.is_file():
        return

    def written_here(directory: str, names: list[str]) -> set[str]:
        place = pathlib.Path(directory).relative_to(root).as_posix()
        hidden = {name for name in names if name.startswith(".")}
        if ("" if place == "." else place) not in converted:
            return hidden
        return hidden | {name for name in names if name in _CONFIG_FILES or name.endswith(_WEIGHT_FILES)}

    shutil.copytree(root, folder, ignore=written_here, dirs_exist_ok=True)
