# SPDX-License-Identifier: Apache-2.0
"""The options that several commands have, and what the commands make of them."""

import inspect
import json
import os
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .call import EMBEDDED, known_call
from .console import console, errors, escape, format_bytes
from .fields import ConfigOptions


if TYPE_CHECKING:
    import torch

    from ..backend.config import TernaryConfig
    from ..calibration import CalibrationConfig
    from ..evaluation import Scorer

DEMO = "demo"

Source = Annotated[str, typer.Argument(help="Folder or Hub id of a float pipeline, or demo.", metavar="SRC")]
Destination = Annotated[pathlib.Path, typer.Argument(help="Folder to write.", metavar="DST")]
PROMPTS_HELP = (
    "Text, JSONL, CSV or Parquet file; - for stdin; template:N for N made-up prompts; datasets:NAME for a data set."
)
Prompts = Annotated[str, typer.Option(help=PROMPTS_HELP, metavar="FILE")]
Limit = Annotated[int | None, typer.Option(help="Use the first prompts only.", min=1)]
Component = Annotated[
    list[str] | None,
    typer.Option(help="Component of the pipeline (repeatable). Default: its denoisers.", metavar="NAME"),
]
Variant = Annotated[str | None, typer.Option(help="Variant of the source's files, e.g. fp16.", metavar="NAME")]
DType = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, ...")]
Offload = Annotated[bool, typer.Option("--offload", help="Keep only the running component on the device.")]
Adapters = Annotated[
    list[str] | None,
    typer.Option("--lora", help="LoRA file to fold into the float model first (repeatable).", metavar="PATH[=SCALE]"),
]
WorkDir = Annotated[
    pathlib.Path | None,
    typer.Option(help="Where an unfinished run is kept for a rerun. Default: a hidden folder beside DST."),
]
MaxShardSize = Annotated[str, typer.Option(help="Largest file to write.", metavar="SIZE")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is to be written if it exists.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check, say what will be run, and write nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def weight_options(*leave_out: str, renamed: Mapping[str, str] | None = None) -> ConfigOptions:
    """The fields of [`TernaryConfig`]."""
    return ConfigOptions(
        "backend/config.py",
        "TernaryConfig",
        "Weights",
        leave_out=("format_version", *leave_out),  # of files that are read
        formerly={"scale_layout": "--scales"},
        renamed=renamed or {},
    )


class CalibrationOptions:
    """The fields of [`CalibrationConfig`] and of what is in it."""

    def __init__(self, prefix: str = "") -> None:
        file = "calibration/config.py"
        nested = ("solver", "sensitivity", "call_kwargs")
        self._own = ConfigOptions(file, "CalibrationConfig", "Calibration", prefix=prefix, leave_out=nested)
        old = {} if prefix else {"descent_passes": "--passes"}
        self._solver = ConfigOptions(file, "SolverConfig", "Calibration", prefix=prefix, formerly=old)
        self._sensitivity = ConfigOptions(file, "SensitivityConfig", "Sensitivity", prefix="sensitivity")
        self._measures = not prefix

    @property
    def groups(self) -> tuple[ConfigOptions, ...]:
        """The options of each class."""
        return (self._own, self._solver, self._sensitivity)[: 3 if self._measures else 2]

    def parameters(self) -> list[inspect.Parameter]:
        """See [`ConfigOptions.parameters`]."""
        return [each for group in self.groups for each in group.parameters()]

    def config(
        self, values: Mapping[str, Any], call_kwargs: Mapping[str, Any], *, sensitivity: bool = False
    ) -> "CalibrationConfig":
        """The config; the sensitivity is measured where one of its options is given, too."""
        from ..calibration import CalibrationConfig, SensitivityConfig, SolverConfig

        own, solver, *rest = (group.given(values) for group in self.groups)
        measured = rest[0] if rest else {}
        if sensitivity or measured:
            own["sensitivity"] = SensitivityConfig(**measured)
        return CalibrationConfig(solver=SolverConfig(**solver), call_kwargs=call_kwargs, **own)


class CallOptions:
    """The arguments of the pipeline call."""

    _NAMED = (
        ("steps", "num_inference_steps", int | None, "Denoising steps.", 1),
        ("guidance", "guidance_scale", float | None, "guidance_scale of the pipeline.", None),
        ("height", "height", int | None, "Pixels.", 1),
        ("width", "width", int | None, "Pixels.", 1),
    )

    def parameters(self) -> list[inspect.Parameter]:
        """The parameters of a command, for typer."""
        panel = "Pipeline call"
        named = [
            (name, kind, typer.Option(help=text, min=least, rich_help_panel=panel))
            for name, _, kind, text, least in self._NAMED
        ]
        text = "Any other argument of the pipeline call (repeatable)."
        other = typer.Option("--set", help=text, metavar="NAME=VALUE", rich_help_panel=panel)
        return [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])
            for name, kind, option in (*named, ("call", list[str] | None, other))
        ]

    def given(self, values: Mapping[str, Any], *sources: str) -> dict[str, Any]:
        """The arguments that were given, over those that the first source that says so was made for."""
        named = {argument: values[name] for name, argument, *_ in self._NAMED}
        places = (str(EMBEDDED) if is_demo(source) else source for source in sources)
        known = next(filter(None, map(known_call, places)), {})
        return {**known, **parse_call_kwargs(values["call"], named)}


CALL = CallOptions()


def ternary_config(options: ConfigOptions, values: Mapping[str, Any]) -> "TernaryConfig":
    """The config of what was given."""
    from ..backend.config import TernaryConfig

    return TernaryConfig(**options.given(values))


def read_prompts(source: str, limit: int | None = None) -> list[str]:
    """`--prompts`; see `rollouts.prompts.read_prompts`."""
    from ..rollouts import prompts

    return prompts.read_prompts(source, limit=limit)


def load_pipeline(source: str, dtype: "torch.dtype") -> Any:
    """Loads a pipeline folder or Hub id, or a variant of the embedded one (`demo`, `demo:rounded`)."""
    if is_demo(source):
        from ..demo.variants import TEACHER, find_variant

        return find_variant(source.partition(":")[2] or TEACHER.name).load(dtype)
    from diffusers import DiffusionPipeline

    from ..backend.folder import check_pipeline, explained_loading, pipeline_parts
    from ..backend.sources import check_weights, read_source_json

    index = read_source_json(source, "model_index.json")
    if index is None:
        raise ValueError(
            f"{source} holds no model_index.json, so it is not a pipeline. Give the folder of a pipeline."
        )
    check_pipeline(index, source=source)
    local = pathlib.Path(source).is_dir()
    if local:
        check_weights(source, pipeline_parts(index, source=source))
    with explained_loading(source), errors.status(f"Loading {escape(source)}"):
        pipeline = DiffusionPipeline.from_pretrained(source, dtype=dtype)
    if not local:  # the files are in the cache now
        check_weights(source, pipeline_parts(index, source=source))
    return pipeline


def parse_adapters(values: list[str] | None) -> "dict[str | os.PathLike[str], float]":
    """`--lora PATH[=SCALE]`, looked at before a model is loaded; see `lora.fold.check_adapters`."""
    from ..lora import check_adapters

    adapters: dict[str | os.PathLike[str], float] = {}
    for value in values or []:
        path, separator, text = value.rpartition("=")
        if not separator or os.path.exists(value):
            path, text = value, "1"
        try:
            scale = float(text)
        except ValueError as error:
            raise ValueError(f"--lora {value!r}: the scale {text!r} is not a number such as 0.8.") from error
        if path in adapters:
            raise ValueError(f"--lora {path} is given twice. Give it once, with the sum of the scales.")
        adapters[path] = scale
    check_adapters(adapters)
    return adapters


def fold_adapters(pipeline: Any, adapters: "Mapping[str | os.PathLike[str], float]") -> list[str]:
    """Folds adapters into a float pipeline; returns the lines that say so."""
    from ..lora import fold_adapters

    return [f"folded into the float model: {adapter}" for adapter in fold_adapters(pipeline, adapters)]


def place_pipeline(pipeline: Any, device: "torch.device", *, offload: bool) -> Any:
    """Moves a pipeline to a device, now or one component at a time."""
    if offload:
        pipeline.enable_model_cpu_offload(device=device)
        return pipeline
    return pipeline.to(device)


def save_pipeline(pipeline: Any, folder: pathlib.Path, *, dtype: str, max_shard_size: str) -> None:
    """Saves a packed pipeline; what is not packed in 16 bits, unless a dtype was asked for."""
    from ..backend.components import store_in_16_bits

    if dtype == "auto":
        store_in_16_bits(pipeline)
    pipeline.save_pretrained(folder, max_shard_size=max_shard_size)


def show_saved(destination: pathlib.Path) -> None:
    """Prints the size of every packed component, and where it is."""
    from ..interop.inspection import inspect_path

    for part in inspect_path(destination):
        if part.format_version is not None:
            console.print(
                f"{escape(part.name)}: {part.packed_bits_per_weight:.3f} bits per converted weight, "
                f"{format_bytes(part.bytes)} ({part.bytes_16bit / part.bytes:.2f}x smaller than 16 bits)",
                soft_wrap=True,
            )
    show_path(destination)


def show_path(destination: pathlib.Path) -> None:
    """Prints where the result is."""
    console.print(f"saved to {escape(str(destination))}", soft_wrap=True)


def is_demo(source: str) -> bool:
    """Whether a source names the embedded model (or a variant of it)."""
    # A local folder of that name comes first.
    return source.partition(":")[0] == DEMO and not pathlib.Path(source).exists()


def place_of(source: str) -> str:
    """A folder or Hub id as it is, and the folder of the embedded pipeline for `demo`."""
    if not is_demo(source):
        return source
    from ..demo.pipeline import demo_folder

    return demo_folder(source.partition(":")[2] or "teacher")


def demo_scorers(prompts: list[str]) -> "dict[str, Scorer]":
    """The embedded model's judge, where the prompts are of its grammar."""
    from ..demo.grammar import attributes_of
    from ..demo.run import judge_scorer

    try:
        for prompt in prompts:
            attributes_of(prompt)
    except ValueError as error:
        console.print(f"The judge is left out: {error}", soft_wrap=True, markup=False)
        return {}
    return {"judge": judge_scorer()}


def parse_call_kwargs(values: list[str] | None, named: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the pipeline call: the options that were given, and `--set NAME=VALUE` (values are JSON)."""
    arguments = {name: value for name, value in named.items() if value is not None}
    for value in values or []:
        name, separator, text = value.partition("=")
        if not separator or not name.isidentifier():
            raise ValueError(f"--set {value!r} is not NAME=VALUE, e.g. true_cfg_scale=4.0.")
        if name in arguments:
            raise ValueError(f"{name} is given twice. Give it once.")
        try:
            arguments[name] = json.loads(text)
        except json.JSONDecodeError:
            arguments[name] = text  # a plain string
    return arguments


def parse_device(name: str) -> "torch.device":
    """`--device`; auto takes the accelerator if there is one.

    Raises:
        ValueError: for what is not a device, and for one that is not in this machine.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name!r} is not a device: {str(error).splitlines()[0]}") from error
    known = ["cpu"]
    if accelerator is not None:
        known += [accelerator.type, *(f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count()))]
    if str(device) not in known:
        raise ValueError(f"--device {name!r} is not available here. Choose from auto, {', '.join(known)}.")
    return device


def parse_dtype(name: str, device: "torch.device | None" = None) -> "torch.dtype":
    """`--dtype`; auto, where there is a device, is float32 on a CPU, else bfloat16."""
    from ..backend.config import COMPUTE_DTYPES

    if name == "auto" and device is not None:
        name = "float32" if device.type == "cpu" else "bfloat16"
    if name not in COMPUTE_DTYPES:
        choices = [*([] if device is None else ["auto"]), *COMPUTE_DTYPES]
        raise ValueError(f"--dtype {name!r} is not one of {', '.join(choices)}.")
    return COMPUTE_DTYPES[name]
