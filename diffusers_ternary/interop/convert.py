# SPDX-License-Identifier: Apache-2.0
"""`convert`: ternary models of others to packed folders, and packed denoisers to the forms of other programs."""

import contextlib
import inspect
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from ..backend.sources import source_error
from ..files.destinations import check_folder
from .export import ExportReport
from .gguf_export import check_gguf_options, export_gguf
from .mflux_export import export_mflux
from .packing import ConversionReport, pack


_EXPORTS: dict[str, Callable[..., ExportReport]] = {"gguf": export_gguf, "mflux": export_mflux}


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
) -> list[ConversionReport] | ExportReport:
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
    # Before anything is downloaded.
    check_folder(destination, sources=[_cached(source), config], overwrite=overwrite)
    return pack(
        _local(source),
        destination,
        components=components,
        config=config,
        variant=variant,
        max_shard_size=max_shard_size,
        verify=verify,
        overwrite=overwrite,
    )


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
