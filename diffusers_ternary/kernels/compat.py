# SPDX-License-Identifier: Apache-2.0
"""Every name of torch that is not part of its documented API, as `compat` has them of other libraries.

Each has a canary in `integration_tests/kernels/test_compat.py`.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
import torch.autograd.forward_ad as forward_ad


P = ParamSpec("P")
FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_transforms = torch._C._functorch.peek_interpreter_stack
_traced_by_jit = torch._C._get_tracing_state


any_autocast = torch._C._is_any_autocast_enabled  # whether it is on for any device, which is quickly asked


def constant_when_traced(function: FunctionT) -> FunctionT:
    """`torch.compiler.assume_constant_result`, which imports the compiler: a second, where nothing is compiled."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_autocast(x: torch.Tensor) -> bool:
    """Whether autocast is on for the device of `x`."""
    if not torch.compiler.is_compiling() and not any_autocast():
        return False
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)  # which knows no meta device


def is_plain(x: torch.Tensor) -> bool:
    """Whether a call on `x` may skip torch's dispatcher: nobody traces or watches it, and it records no gradient.

    Dispatch modes (fake tensors, FLOP counters, exports), transforms (vmap, forward-mode derivatives), tracing and
    tensor subclasses all need the operator.
    """
    return (
        not torch.compiler.is_dynamo_compiling()
        and (type(x) is torch.Tensor or type(x) is torch.nn.Parameter)
        and not (x.requires_grad and torch.is_grad_enabled())
        and _dispatch_modes() == 0
        and _function_transforms() is None
        and _traced_by_jit() is None
        and forward_ad._current_level < 0
    )


def returns_no_view(function: Callable[P, torch.Tensor]) -> Callable[P, torch.Tensor]:
    """Makes a function return a tensor of its own where it would return a view of one; the memory is the same.

    In training, autograd refuses to change an output of a custom operator in place if the output is a view, which the
    output of `nn.Linear` never is.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> torch.Tensor:
        y = function(*args, **kwargs)
        return y if y._base is None else torch.ops.aten._unsafe_view(y, y.shape)

    return wrapper
