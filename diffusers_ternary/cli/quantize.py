# SPDX-License-Identifier: Apache-2.0
"""`diffusers-ternary quantize`."""

import pathlib
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..files import parse_size
from ..files.destinations import check_folder, output_folder
from . import options
from .console import ExitCode, console, escape, explained_errors, format_bytes
from .fields import with_options
from .quiet import quiet_hosts


if TYPE_CHECKING:
    from ..backend.config import TernaryConfig


WEIGHTS = options.weight_options()


@with_options(WEIGHTS)
def quantize_command(
    source: Annotated[
        str, typer.Argument(help="Folder or Hub id of a float pipeline or model, or demo.", metavar="SRC")
    ],
    destination: options.Destination,
    dtype: Annotated[str, typer.Option(help="Dtype of what is not converted.")] = "bfloat16",
    variant: options.Variant = None,
    max_shard_size: options.MaxShardSize = "10GB",
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    **values: Any,
) -> None:
    """Rounds a float pipeline or model to ternary weights and saves it packed.

    Reads and packs layer by layer: memory never holds more than one file of the source and the packed model. DST
    appears only when it is complete.

    Example: diffusers-ternary quantize black-forest-labs/FLUX.1-dev flux-ternary --override "*.norm1*.linear=int8"

    Rounding alone spoils the pictures of most models; it is the starting point of calibration and distillation.
    """
    quiet_hosts()
    with explained_errors(ExitCode.USAGE):
        config = options.ternary_config(WEIGHTS, values)
        model_dtype = options.parse_dtype(dtype)
        parse_size(max_shard_size, name="--max-shard-size")
    with explained_errors():
        from ..backend.sources import load_quantized

        place = options.place_of(source)
        if dry_run:
            check_folder(destination, sources=[place], overwrite=overwrite)
            _show(place, config)
            return
        with output_folder(destination, sources=[place], overwrite=overwrite) as folder:
            model = load_quantized(place, config, dtype=model_dtype, variant=variant)
            model.save_pretrained(folder, max_shard_size=max_shard_size)
        options.show_saved(destination)


def _show(place: str, config: "TernaryConfig") -> None:
    """What would be quantized, of headers alone; the weights of a Hub id are not downloaded for it."""
    from ..backend.sources import read_source_json, selected_components
    from ..interop.inspection import inspect_path

    index = read_source_json(place, "model_index.json")
    selected = None if index is None else selected_components(index, config, source=place)
    console.print(escape(repr(config)), soft_wrap=True, highlight=False)
    if not pathlib.Path(place).is_dir():
        console.print(f"{escape(place)} is on the Hub and would be read from there", soft_wrap=True)
        return
    for part in inspect_path(pathlib.Path(place)):
        what = "to quantize" if selected is None or part.name in selected else "kept"
        console.print(f"{escape(part.name)}: {format_bytes(part.bytes)}, {what}", soft_wrap=True)
