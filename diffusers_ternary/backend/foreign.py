# SPDX-License-Identifier: Apache-2.0
"""Recognizes checkpoints that another quantization method has written."""

from collections.abc import Mapping
from typing import Any

from .checkpoint import StoredTensor, load_tensor
from .float8 import Float8Scales, Header, find_float8_scales


# Names that a method stores beside a weight.
_MARKS = {
    "bitsandbytes": (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4", ".SCB", ".weight_format"),
    "GPTQ": (".qweight", ".qzeros"),
    "Nunchaku": (".wscales", ".smooth_factor"),
    "compressed-tensors": (".weight_packed", ".weight_global_scale", ".weight_zero_point"),
    "NVFP4": (".weight_scale_2",),
    "Quanto": (".weight._data", ".weight._scale"),
}
_REMEDY = "Ternary rounding needs the float weights: load the original checkpoint of the model."


def check_float_checkpoint(tensors: Mapping[str, StoredTensor], *, source: str) -> Float8Scales:
    """Checks by its headers that a checkpoint holds float weights, 8-bit ones with scales included.

    Args:
        tensors (`Mapping[str, StoredTensor]`): all tensors.
        source (`str`): for messages.

    Returns:
        [`Float8Scales`]: the scales of its 8-bit floats.

    Raises:
        ValueError: names the method that has quantized it, or what is not understood, and the tensor.
    """
    refuse_quantized_headers(tensors, source=source)
    return find_float8_scales(tensors, lambda name: load_tensor(tensors[name], name), source=source)


def refuse_quantized_headers(tensors: Mapping[str, Header], *, source: str) -> None:
    """Raises if the headers of a checkpoint show weights that another method has quantized.

    Raises:
        ValueError: names the method, the tensor and the remedy.
    """
    for method, marks in _MARKS.items():
        found = next((name for name in tensors if name.endswith(marks)), None)
        if found is not None:
            raise ValueError(f"{source} holds weights that {method} has quantized ({found}). {_REMEDY}")
    for name, stored in tensors.items():
        if name.endswith(".weight") and stored.dtype in ("U8", "I8", "I16", "I32") and len(stored.shape) > 1:
            raise ValueError(f"{source}: {name} is {stored.dtype}, not a float weight. {_REMEDY}")


def refuse_gguf(state_dict: Mapping[str, Any], *, source: str) -> None:
    """Raises if a state dict holds tensors that diffusers has read from a GGUF file.

    Raises:
        ValueError: names the tensor and the remedy.
    """
    for name, tensor in state_dict.items():
        if getattr(tensor, "quant_type", None) is not None:
            raise ValueError(f"{source}: {name} is quantized ({tensor.quant_type!r}, GGUF). {_REMEDY}")
