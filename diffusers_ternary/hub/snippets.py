# SPDX-License-Identifier: Apache-2.0
"""The code that a card shows; every snippet runs as it stands."""

import json

from .base_card import BaseCard
from .dense import VARIANT
from .loader import LOADER
from .records import Evaluation
from .source import DENSE, Source


_IMPORT = "import torch, diffusers_ternary  # the import registers the packed format"
_DENOISERS = {"unet": ("UNet",), "transformer": ("Transformer", "DiT")}
# Arguments that people set by hand; everything else of a call is in evaluation.json.
_SHOWN_ARGUMENTS = (
    "num_inference_steps",
    "guidance_scale",
    "height",
    "width",
    "max_sequence_length",
    "true_cfg_scale",
)


def usage(source: Source, repo_id: str, base: BaseCard, evaluation: Evaluation | None) -> str:
    """Loads the repository, import line first; with the prompt and arguments of the evaluation, if there was one."""
    if source.is_pipeline:
        if evaluation is not None or (base.pipeline_tag or "").endswith("-to-image"):
            run = f"image = pipe({_call(evaluation)}).images[0]"
        elif (base.pipeline_tag or "").endswith("-to-video"):
            run = f"frames = pipe({_call(evaluation)}).frames[0]"
        else:
            run = f"result = pipe({_call(evaluation)})"
        return (
            f"{_IMPORT}\n"
            "from diffusers import DiffusionPipeline\n\n"
            f'pipe = DiffusionPipeline.from_pretrained("{repo_id}", dtype=torch.bfloat16).to("cuda")  # or "cpu"\n'
            f"{run}"
        )
    return _model_usage(source, f'"{repo_id}"', base.repo_id, f"{_IMPORT}\n")


def loader_usage(repo_id: str) -> str:
    """Loads a pipeline by its loader file."""
    return (
        "from diffusers import DiffusionPipeline\n\n"
        "pipe = DiffusionPipeline.from_pretrained(\n"
        f'    "{repo_id}", custom_pipeline="{LOADER.removesuffix(".py")}", trust_remote_code=True\n)'
    )


def dense_usage(source: Source, repo_id: str, base_model: str) -> str:
    """Loads the bfloat16 copy without the package."""
    if not source.is_pipeline:
        return _model_usage(
            source, f'"{repo_id}", subfolder="{DENSE}", variant="{VARIANT}"', base_model, "import torch\n"
        )
    classes: dict[str, set[str]] = {"diffusers": {"DiffusionPipeline"}}
    for part in source.packed:
        classes.setdefault(part.library, set()).add(part.class_name)
    imports = [f"from {library} import {', '.join(sorted(names))}" for library, names in sorted(classes.items())]
    loads = [
        f"{part.name} = {part.class_name}.from_pretrained(\n"
        f'    "{repo_id}", subfolder="{DENSE}/{part.name}", variant="{VARIANT}", dtype=torch.bfloat16\n)'
        for part in source.packed
    ]
    given = ", ".join(f"{part.name}={part.name}" for part in source.packed)
    pipeline = f'pipe = DiffusionPipeline.from_pretrained("{repo_id}", {given}, dtype=torch.bfloat16)'
    return "\n".join(["import torch", *imports, "", *loads, pipeline])


def _model_usage(source: Source, where: str, base_model: str, imports: str) -> str:
    cls = source.class_name
    component = next((name for name, marks in _DENOISERS.items() if any(mark in cls for mark in marks)), None)
    if source.library != "diffusers" or component is None:
        library = source.library
        return f"{imports}from {library} import {cls}\n\nmodel = {cls}.from_pretrained({where}, dtype=torch.bfloat16)"
    return (
        f"{imports}from diffusers import DiffusionPipeline, {cls}\n\n"
        f"{component} = {cls}.from_pretrained({where}, dtype=torch.bfloat16)\n"
        f'pipe = DiffusionPipeline.from_pretrained("{base_model}", {component}={component}, dtype=torch.bfloat16)'
    )


def _call(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return '"a photo of a red fox in the snow"'
    arguments = evaluation.data.get("call_kwargs") or {}
    shown = "".join(f", {name}={arguments[name]!r}" for name in _SHOWN_ARGUMENTS if name in arguments)
    # JSON strings are Python strings; backticks would end the code block only as a line of their own.
    return json.dumps(evaluation.prompts[0], ensure_ascii=False) + shown
