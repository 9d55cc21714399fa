# SPDX-License-Identifier: Apache-2.0
"""What every operator checks of its tensors, as the operators of torch do."""

import torch


FLOAT_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))


def check_float(input: torch.Tensor) -> None:
    """Checks that activations are of a dtype that a float layer multiplies.

    Raises:
        RuntimeError: as `nn.Linear` does for integers, bools, complex numbers and 8-bit floats.
    """
    if input.dtype not in FLOAT_DTYPES:
        raise RuntimeError(
            f"A packed layer multiplies float32, bfloat16, float16 or float64 inputs, got {input.dtype}. If the model "
            "casts activations to the dtype of a weight: packed weights are integers, so keep that layer in float."
        )


def check_devices(device: torch.device, owner: str, **tensors: torch.Tensor | None) -> None:
    """Checks that all tensors are where the first one is.

    torch sends a call with one tensor on the meta device to the fake kernel, which returns memory without values.

    Raises:
        RuntimeError: as `nn.Linear` does; names the tensor that is elsewhere.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device and not _same(tensor.device, device):
            raise RuntimeError(
                f"{name} is on {tensor.device} and {owner} on {device}: all tensors of a ternary layer must be on one "
                "device. An offloaded layer must be called through its module, whose hooks load it."
            )


def _same(one: torch.device, other: torch.device) -> bool:
    """Fake tensors may be on "cuda" beside others on "cuda:0"."""
    return one.type == other.type and None in (one.index, other.index)
