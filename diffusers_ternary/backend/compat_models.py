# SPDX-License-Identifier: Apache-2.0
"""What diffusers' and transformers' model classes do with a quantized model, made right for packed layers.

The hosts know a quantized model by its mark (`is_quantized`) only. They refuse every cast of one, and count the bytes
of its codes as parameters. Each name that is replaced here has a canary in
`integration_tests/backend/test_host_models.py`.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from .compat_offload import complete_for_saving


# Methods that raise on a quantized model, though a packed layer keeps its codes and scales through any cast.
_CASTS = ("to", "half", "float")


def unwrap_compiled(module: Any) -> Any:
    """The module below what `torch.compile(module)` returns; any other object as it is."""
    return getattr(module, "_orig_mod", module) if isinstance(module, nn.Module) else module


def patch_model_class(
    cls: type[nn.Module],
    is_packed: Callable[[nn.Module], bool],
    count_parameters: Callable[..., int],
    not_trainable: str,
) -> None:
    """Makes casts, counts, `requires_grad_` and `save_pretrained` of a host's base class right for packed models.

    Args:
        cls (`type`): `ModelMixin` of diffusers or `PreTrainedModel` of transformers.
        is_packed (`Callable`): whether a model has packed layers of ours.
        count_parameters (`Callable`): in place of `num_parameters`, with its keywords.
        not_trainable (`str`): why `requires_grad_(True)` is refused.
    """
    if hasattr(vars(cls)["to"], "packed"):
        return
    for name in _CASTS:
        setattr(cls, name, _without_mark(vars(cls)[name], is_packed))
    setattr(cls, "requires_grad_", _refusing(cls.requires_grad_, is_packed, not_trainable))  # noqa: B010
    original = cls.num_parameters  # type: ignore[attr-defined]

    @functools.wraps(original)
    def num_parameters(self: Any, *args: Any, **kwargs: Any) -> int:
        return (count_parameters if is_packed(self) else original)(self, *args, **kwargs)

    save = cls.save_pretrained  # type: ignore[attr-defined]

    @functools.wraps(save)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        with complete_for_saving(self) if is_packed(self) else contextlib.nullcontext():
            return save(self, *args, **kwargs)

    cls.num_parameters = num_parameters  # type: ignore[attr-defined]
    cls.save_pretrained = save_pretrained  # type: ignore[attr-defined]


def _refusing(method: Callable[..., Any], is_packed: Callable[[nn.Module], bool], reason: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def requires_grad_(self: Any, requires_grad: bool = True) -> Any:
        if requires_grad and is_packed(self):  # torch would stop at the first codes, with half of the model trainable
            raise ValueError(f"{type(self).__name__} {reason}")
        return method(self, requires_grad)

    return requires_grad_


def _without_mark(method: Callable[..., Any], is_packed: Callable[[nn.Module], bool]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not getattr(self, "is_quantized", False) or not is_packed(self):
            return method(self, *args, **kwargs)
        self.is_quantized = False
        try:
            return method(self, *args, **kwargs)
        finally:
            self.is_quantized = True

    wrapper.packed = True  # type: ignore[attr-defined]
    return wrapper


def control_constructors() -> Iterator[tuple[type, str]]:
    """Class and name of every constructor of diffusers that copies the weights of a denoiser."""
    from diffusers.models import controlnets, unets

    names = ("from_unet", "from_transformer", "from_unet2d")
    classes = [value for module in (controlnets, unets) for value in vars(module).values() if isinstance(value, type)]
    for cls in dict.fromkeys(classes):
        yield from ((cls, name) for name in names if name in vars(cls))


def patch_control_constructors(float_copy: Callable[[nn.Module], nn.Module]) -> None:
    """Makes the constructors of control networks copy float weights out of a packed denoiser.

    Args:
        float_copy (`Callable`): gives the float model of a packed one, and any other module as it is.
    """
    for cls, name in control_constructors():
        original = vars(cls)[name].__func__
        if not hasattr(original, "packed"):
            setattr(cls, name, classmethod(_from_float_copy(original, float_copy)))


def _from_float_copy(method: Callable[..., Any], float_copy: Callable[[nn.Module], nn.Module]) -> Callable[..., Any]:
    signature = inspect.signature(method)

    @functools.wraps(method)
    def wrapper(cls: type, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(cls, *args, **kwargs)
        for name in ("unet", "transformer"):
            if isinstance(bound.arguments.get(name), nn.Module):
                bound.arguments[name] = float_copy(unwrap_compiled(bound.arguments[name]))
        return method(*bound.args, **bound.kwargs)

    wrapper.packed = True  # type: ignore[attr-defined]
    return wrapper


def patch_ema(quant_method: str) -> None:
    """Makes diffusers' `EMAModel.save_pretrained` say what to do instead of filling a float model with codes."""
    from diffusers.training_utils import EMAModel

    original = EMAModel.save_pretrained
    if hasattr(original, "packed"):
        return

    @functools.wraps(original)
    def save_pretrained(self: Any, path: Any) -> None:
        entries: Any = self.model_config or {}
        config = entries.get("quantization_config")
        method = getattr(config, "quant_method", None) or (
            config.get("quant_method") if hasattr(config, "get") else ""
        )
        if getattr(method, "value", method) == quant_method:
            raise ValueError(
                f"EMAModel cannot build a packed {self.model_cls.__name__} from its config to save these weights. "
                "Copy them into the model itself: ema.store(model.parameters()); ema.copy_to(model.parameters()); "
                "model.save_pretrained(folder); ema.restore(model.parameters())."
            )
        original(self, path)

    save_pretrained.packed = True  # type: ignore[attr-defined]
    EMAModel.save_pretrained = save_pretrained
