# SPDX-License-Identifier: Apache-2.0
"""The code that a card shows, every snippet running as it stands, and the loader file of a repository."""

import json

from .base_card import BaseCard
from .dense import VARIANT
from .reports import Evaluation
from .source import DENSE, Source


LOADER = "ternary_pipeline.py"
"""Loads a repository without the import line, for who trusts remote code: `custom_pipeline="ternary_pipeline"`."""

_LOADER_TEXT = '''# SPDX-License-Identifier: Apache-2.0
"""Loads this repository without `import diffusers_ternary` in your code (the package must be installed):

    DiffusionPipeline.from_pretrained(REPO, custom_pipeline="ternary_pipeline", trust_remote_code=True)
"""

import diffusers_ternary  # noqa: F401 - registers the packed format
from diffusers import {name}


class Ternary{name}({name}):
    """The stock {name}; the import above is all that is new."""
'''
_IMPORT = "import torch, diffusers_ternary  # the import registers the packed format"
_DENOISERS = {"unet": ("UNet",), "transformer": ("Transformer", "DiT")}
# What people set by hand; everything else of a call is in evaluation.json.
_SHOWN = ("num_inference_steps", "guidance_scale", "height", "width", "max_sequence_length", "true_cfg_scale")


def usage(source: Source, repo_id: str, base: BaseCard, evaluation: Evaluation | None) -> str:
    """Loads the repository, import line first; with the prompt and arguments of the evaluation, if there was one."""
    if not source.is_pipeline:
        return _model_usage(source, f'"{repo_id}"', base.repo_id, f"{_IMPORT}\n")
    tag, run = base.pipeline_tag or "", f"pipe({_call(evaluation)})"
    if evaluation is not None or tag.endswith("-to-image"):
        run = f"image = {run}.images[0]"
    else:
        run = f"frames = {run}.frames[0]" if tag.endswith("-to-video") else f"result = {run}"
    return (
        f"{_IMPORT}\n"
        "from diffusers import DiffusionPipeline\n\n"
        f'pipe = DiffusionPipeline.from_pretrained("{repo_id}", dtype=torch.bfloat16).to("cuda")  # or "cpu"\n'
        f"{run}"
    )


def loader_usage(repo_id: str) -> str:
    """Loads a pipeline by its loader file."""
    return (
        "from diffusers import DiffusionPipeline\n\n"
        "pipe = DiffusionPipeline.from_pretrained(\n"
        f'    "{repo_id}", custom_pipeline="{LOADER.removesuffix(".py")}", trust_remote_code=True\n)'
    )


def has_loader(source: Source) -> bool:
    """Whether a repository gets the loader file: pipelines of diffusers' own classes do."""
    import diffusers

    found = getattr(diffusers, source.class_name, None)
    return source.is_pipeline and isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)


def loader_text(class_name: str) -> str:
    """The loader file for a pipeline class of diffusers, e.g. `"FluxPipeline"`."""
    return _LOADER_TEXT.format(name=class_name)


def dense_usage(source: Source, repo_id: str, base_model: str) -> str:
    """Loads the bfloat16 copy without the package."""
    if not source.is_pipeline:
        place = f'"{repo_id}", subfolder="{DENSE}", variant="{VARIANT}"'
        return _model_usage(source, place, base_model, "import torch\n")
    classes: dict[str, set[str]] = {"diffusers": {"DiffusionPipeline"}}
    for model in source.packed.values():
        classes.setdefault(model.library, set()).add(model.class_name)
    imports = [f"from {library} import {', '.join(sorted(names))}" for library, names in sorted(classes.items())]
    loads = [
        f"{name} = {model.class_name}.from_pretrained(\n"
        f'    "{repo_id}", subfolder="{DENSE}/{name}", variant="{VARIANT}", dtype=torch.bfloat16\n)'
        for name, model in source.packed.items()
    ]
    given = ", ".join(f"{name}={name}" for name in source.packed)
    pipeline = f'pipe = DiffusionPipeline.from_pretrained("{repo_id}", {given}, dtype=torch.bfloat16)'
    return "\n".join(["import torch", *imports, "", *loads, pipeline])


def _model_usage(source: Source, where: str, base_model: str, imports: str) -> str:
    cls, library = source.class_name, source.library
    load = f"{cls}.from_pretrained({where}, dtype=torch.bfloat16)"
    component = next((name for name, marks in _DENOISERS.items() if any(mark in cls for mark in marks)), None)
    if library != "diffusers" or component is None:
        return f"{imports}from {library} import {cls}\n\nmodel = {load}"
    return (
        f"{imports}from diffusers import DiffusionPipeline, {cls}\n\n"
        f"{component} = {load}\n"
        f'pipe = DiffusionPipeline.from_pretrained("{base_model}", {component}={component}, dtype=torch.bfloat16)'
    )


def _call(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return '"a photo of a red fox in the snow"'
    arguments = evaluation.data.get("call_kwargs") or {}
    shown = "".join(f", {name}={arguments[name]!r}" for name in _SHOWN if name in arguments)
    # JSON strings are Python strings; backticks would end the code block only as a line of their own.
    return json.dumps(evaluation.prompts[0], ensure_ascii=False) + shown
