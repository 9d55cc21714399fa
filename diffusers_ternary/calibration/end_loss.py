# SPDX-License-Identifier: Apache-2.0
"""What an error of a layer's output does to the denoiser's prediction, gathered by one backward per call."""

import contextlib
import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..layers import FLOAT_TYPES, output_rows
from ..rollouts import prediction_of
from .config import CHECKPOINTED_WEIGHTS


logger = logging.getLogger(__name__)


class OutputCollector:
    """Context manager: gathers A = E[g gᵀ] of every layer, g being the gradient of rᵀ v for its output.

    v is what the denoiser predicts and r a vector of random signs, another for each call. With the Jacobian J of v for
    the output of a layer, E[g gᵀ] = E[Jᵀ J]: to first order an error e of that output changes v by |J e|², which is
    eᵀ A e on average. Together with the inputs' H this is the Kronecker-factored Gauss-Newton matrix of the squared
    error of the velocity (YAQA, arXiv 2505.22988). Calls at all timesteps count alike.

    Each call of the denoiser runs with gradients and is followed by its backward, for activations alone: twice the
    work of the call, and the memory of its activations; with more than 500 million weights activations inside blocks
    are computed again instead, where the model can do that. Beside these, memory holds 4 N² bytes for each layer.

    Args:
        model (`nn.Module`): the denoiser. Its parameters require no gradient inside.
        layers (`Iterable[str]`): float linear layers and convolutions to watch.
        dtype (`torch.dtype`): float32 or float64, of products and sums.
        seed (`int`): of the random signs.
    """

    def __init__(self, model: nn.Module, layers: Iterable[str], *, dtype: torch.dtype, seed: int) -> None:
        self._model = model
        self._layers = list(layers)
        self._dtype = dtype
        self._generator = torch.Generator().manual_seed(seed)
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "OutputCollector":
        for parameter in self._model.parameters():
            if parameter.requires_grad:
                self._stack.callback(parameter.requires_grad_, True)
                parameter.requires_grad_(False)
        if sum(parameter.numel() for parameter in self._model.parameters()) > CHECKPOINTED_WEIGHTS:
            self._checkpoint_gradients()
        for name in self._layers:
            handle = self._model.get_submodule(name).register_forward_hook(self._observer(name))
            self._stack.callback(handle.remove)
        before = self._model.register_forward_pre_hook(self._begin)
        self._stack.callback(before.remove)
        after = self._model.register_forward_hook(self._finish, always_call=True)
        self._stack.callback(after.remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _checkpoint_gradients(self) -> None:
        model: Any = self._model
        if getattr(model, "is_gradient_checkpointing", True):
            return
        try:
            model.enable_gradient_checkpointing()
        except (AttributeError, ValueError) as error:
            logger.warning("All activations are kept, which takes memory: %s", error)
        else:
            self._stack.callback(model.disable_gradient_checkpointing)

    def _observer(self, name: str) -> Any:
        def observe(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            assert isinstance(module, FLOAT_TYPES)
            if not torch.is_grad_enabled():  # a forward of somebody else, inside the call
                return output
            if not output.requires_grad:  # nothing before it is watched; not a leaf, which may not be changed in place
                output = output.detach().requires_grad_().clone()
            output.register_hook(lambda gradient: self._add(name, output_rows(module, gradient)))
            return output

        return observe

    @torch.no_grad()
    def _add(self, name: str, rows: torch.Tensor) -> None:
        rows = rows.to(self._dtype)  # [M, N]
        if name not in self._sums:
            self._sums[name] = torch.zeros(rows.shape[1], rows.shape[1], dtype=self._dtype, device=rows.device)
        self._sums[name].addmm_(rows.T, rows)
        self._counts[name] = self._counts.get(name, 0) + rows.shape[0]

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        torch.set_grad_enabled(True)

    def _finish(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        torch.set_grad_enabled(False)  # as rollouts are drawn
        if output is None:  # the call failed
            return
        prediction = prediction_of(output)
        if not bool(torch.isfinite(prediction).all()):
            raise ValueError(
                "The denoiser's own output holds NaN or Inf. Load the pipeline in bfloat16 or float32 instead of "
                "float16, and check that it draws images."
            )
        if prediction.requires_grad:
            signs = torch.randint(0, 2, prediction.shape, generator=self._generator).mul_(2).sub_(1)
            prediction.backward(signs.to(prediction))

    def outputs(self) -> dict[str, torch.Tensor]:
        """A, `[N, N]`, of every layer that the prediction depends on.

        Raises:
            ValueError: if a gradient was not finite.
        """
        for name, total in self._sums.items():
            if not bool(torch.isfinite(total.diagonal()).all()):
                raise ValueError(
                    f"{name}: the gradient of the denoiser's prediction for its output holds NaN or Inf. Load the "
                    "pipeline in bfloat16 or float32 instead of float16, or set end_loss=False."
                )
        return {name: total / self._counts[name] for name, total in self._sums.items() if bool(total.any())}
