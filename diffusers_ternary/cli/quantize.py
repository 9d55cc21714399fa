# SPDX-License-Identifier: Apache-2.0
"""`diffusers-ternary quantize`."""

from typing import Annotated, Any

import typer

from ..files import parse_size
from ..files.destinations import output_folder
from . import options
from .console import ExitCode, explained_errors
from .fields import with_options
from .quiet import quiet_hosts


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

        place = _resolve(source)
        with output_folder(destination, sources=[place], overwrite=overwrite) as folder:
            model = load_quantized(place, config, dtype=model_dtype, variant=variant)
            model.save_pretrained(folder, max_shard_size=max_shard_size)
        options.show_saved(destination)


def _resolve(source: str) -> str:
    if not options.is_demo(source):
        return source
    from ..demo.pipeline import demo_folder

    return demo_folder(source.partition(":")[2] or "teacher")
