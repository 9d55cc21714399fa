# SPDX-License-Identifier: Apache-2.0
"""Which kernels serve a device: asked by the operators on GPUs, by `repr` and by logs."""

import functools
import logging

import torch

from .. import cpu


logger = logging.getLogger(__name__)

# ROCm is "cuda" to torch as well.
TRITON_DEVICE_TYPES = ("cuda", "xpu")


def triton_serves(device: torch.device) -> bool:
    """Whether Triton's kernels run on a GPU; says so, or why not, in the log, once for each device."""
    return _triton_serves(device.type, device.index or 0)


@functools.cache
def _triton_serves(device_type: str, index: int) -> bool:
    from .. import triton as kernels

    reason = kernels.unavailable_reason(device_type, index)
    if reason is not None:
        logger.warning("Ternary layers on %s:%d use the torch reference: %s.", device_type, index, reason)
    else:
        logger.info("Ternary layers on %s:%d use the Triton kernels.", device_type, index)
    return reason is None


def kernel_name(device: torch.device | str, activation_dtype: str) -> str:
    """Which kernel serves a device, for `repr` and logs.

    Args:
        device (`torch.device` or `str`): where the layer is.
        activation_dtype (`str`): of the layer. Where it is `"auto"`, or where the device has no such dtype, the name
            says what large products get.
    """
    device = torch.device(device)
    if device.type in TRITON_DEVICE_TYPES:
        return _gpu_kernel_name(device, activation_dtype)
    if device.type == "cpu" and activation_dtype in ("auto", "int8"):
        return f"{cpu.kernel_name()} int8"
    if device.type == "cpu" and activation_dtype == "none":
        return "blocked float32"
    if device.type == "mps" and torch.backends.mps.is_available():
        return "metal unpack, torch matmul"
    return "torch"


def _gpu_kernel_name(device: torch.device, activation_dtype: str) -> str:
    # Fake tensors name devices that the machine need not have.
    if not torch.get_device_module(device.type).is_available() or not triton_serves(device):
        return "torch"
    from .. import triton as kernels

    served = kernels.served_activation_dtype(device.type, device.index or 0, activation_dtype)
    return "triton" if served == "none" else f"triton {served}"
