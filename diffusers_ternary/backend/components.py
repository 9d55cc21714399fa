# SPDX-License-Identifier: Apache-2.0
"""The components of a pipeline: below the wrappers of `torch.compile`, and each module once."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from .compat import keep_in_fp32_names
from .compat_models import unwrap_compiled
from .summary import has_packed_layers


DENOISERS = ("transformer", "unet")
FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def is_pipeline(value: Any) -> bool:
    """Whether this is a pipeline of diffusers, modular ones included."""
    from diffusers import DiffusionPipeline  # not at import: it loads half of diffusers

    modular = sys.modules.get("diffusers.modular_pipelines.modular_pipeline")
    return isinstance(value, DiffusionPipeline if modular is None else (DiffusionPipeline, modular.ModularPipeline))


def modules_of(pipeline: Any) -> dict[str, nn.Module]:
    """The models of a pipeline by component name, without the wrappers of `torch.compile`."""
    parts = {name: unwrap_compiled(part) for name, part in pipeline.components.items()}
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


def encodes_text(component: str) -> bool:
    """Whether a component of this name reads the prompt."""
    return component.startswith("text_encoder")


def denoiser_name(pipeline: Any, component: str | None = None) -> str:
    """The name of the component that a pipeline calls at every step; of several, of the one it calls first.

    Args:
        pipeline (`DiffusionPipeline`): of diffusers.
        component (`str`, *optional*): the name of another one that it calls so, e.g. `"transformer_2"`.

    Raises:
        ValueError: if the pipeline has no model of that name; if none is given, neither `transformer` nor `unet`.
    """
    known = [name for name, part in pipeline.components.items() if isinstance(part, nn.Module)]
    names = DENOISERS if component is None else (component,)
    found = next((name for name in names if name in known), None)
    if found is None:
        raise ValueError(
            f"{type(pipeline).__name__} has no {' or '.join(names)} that is called at every step. Choose from "
            f"{', '.join(known) or 'nothing: it has no models'}."
        )
    return found


def denoiser_of(pipeline: Any, component: str | None = None) -> nn.Module:
    """The model that a pipeline calls at every step; arguments and errors as of [`denoiser_name`]."""
    model: nn.Module = pipeline.components[denoiser_name(pipeline, component)]
    return model


@contextlib.contextmanager
def uncompiled(pipeline: Any) -> Iterator[None]:
    """Puts the modules below `pipe.transformer = torch.compile(...)` in place of the wrappers for a while.

    What is recorded, replaced and saved are the modules themselves: names under a wrapper start with `_orig_mod`, and
    hooks under one are compiled away. The wrappers come back as they were.
    """
    wrapped = {name: part for name, part in pipeline.components.items() if unwrap_compiled(part) is not part}
    for name, part in wrapped.items():
        setattr(pipeline, name, unwrap_compiled(part))
    try:
        yield
    finally:
        for name, part in wrapped.items():
            setattr(pipeline, name, part)


def below_compiled_wrappers(function: FunctionT) -> FunctionT:
    """Makes a function of pipelines and models work on the modules below the wrappers of `torch.compile`.

    Returned objects are those that came in, wrappers included.
    """

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        values = [*args, *kwargs.values()]
        with contextlib.ExitStack() as stack:
            for value in values:
                if is_pipeline(value):
                    stack.enter_context(uncompiled(value))
            unwrapped = {name: unwrap_compiled(value) for name, value in kwargs.items()}
            result = function(*map(unwrap_compiled, args), **unwrapped)
        wrappers = {id(unwrap_compiled(value)): value for value in values if isinstance(value, nn.Module)}
        if isinstance(result, tuple):  # with its report
            return tuple(wrappers.get(id(part), part) for part in result)
        return wrappers.get(id(result), result)

    return wrapper  # type: ignore[return-value]


def store_in_16_bits(pipeline: Any) -> None:
    """Casts what is not packed in quantized components to bfloat16, as it is stored; float32 modules stay.

    Calibration and distillation compute in float32 on a CPU, which would double what the kept layers take in a file.
    """
    for model in pipeline.components.values():
        if not isinstance(model, nn.Module) or not has_packed_layers(model):
            continue
        float32 = set(keep_in_fp32_names(model))
        for name, parameter in model.named_parameters():
            if parameter.dtype == torch.float32 and not float32.intersection(name.split(".")):
                parameter.data = parameter.data.to(torch.bfloat16)
