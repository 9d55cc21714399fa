# SPDX-License-Identifier: Apache-2.0
"""Packs one layer: exactly if its weight is ternary already, else by the rounding that the config asks for."""

import dataclasses
import logging
from collections.abc import Mapping

import torch
from torch import nn

from ..format import Int8Spec
from ..layers import QuantizedLayer
from ..ternarize import TernaryFit, TernaryWeight, quantize_int8, recover, round_to
from .config import RECOVER, TernaryConfig


logger = logging.getLogger(__name__)
NOT_TERNARY = "not ternary, so not recovered"


@dataclasses.dataclass
class PackingRecord:
    """What was found while the layers of one model were packed.

    Args:
        exact (`list[str]`): layers whose weights were ternary already.
        almost (`dict[str, TernaryFit]`): layers that are ternary for the most part.
        kept (`list[str]`): layers left in float by `rounding="recover"`.
    """

    exact: list[str] = dataclasses.field(default_factory=list)
    almost: dict[str, TernaryFit] = dataclasses.field(default_factory=dict)
    kept: list[str] = dataclasses.field(default_factory=list)

    def report(self, model: nn.Module) -> None:
        """Logs a line on the layers that were ternary, and one on those that almost are.

        Raises:
            ValueError: if only ternary layers were to be packed, and there is none.
        """
        if self.kept and not self.exact:
            raise nothing_ternary(model, self.almost, looked_at=len(self.kept))
        if self.exact:
            logger.warning(
                "%s: the weights of %d layers are ternary already (%s ...); packed exactly, not rounded again.",
                type(model).__name__,
                len(self.exact),
                self.exact[0],
            )
        for name, fit in self.almost.items():
            logger.warning("%s is almost ternary (%s): %s.", name, fit, "kept" if name in self.kept else "rounded")


def nothing_ternary(model: nn.Module, fits: Mapping[str, TernaryFit], *, looked_at: int) -> ValueError:
    """The error of `rounding="recover"` on a model without ternary layers; `fits`: layers that come close."""
    nearest = max(fits.items(), key=lambda item: item[1].fraction, default=None)
    hint = f" The nearest is {nearest[0]}: {nearest[1]}." if nearest else ""
    return ValueError(
        f"{type(model).__name__} has no layer whose weights are ternary ({looked_at} looked at).{hint} "
        f'rounding="{RECOVER}" never rounds: choose another rounding to quantize this model.'
    )


def pack_layer(
    layer: QuantizedLayer, weight: torch.Tensor, *, name: str, config: TernaryConfig, record: PackingRecord
) -> bool:
    """Fills a placeholder with the packed `weight`: exactly if that is ternary already, else rounded to its spec.

    Args:
        layer ([`QuantizedLayer`]): a placeholder.
        weight (`torch.Tensor`): float, of the placeholder's shape, in the dtype of the checkpoint.
        name (`str`): module name.
        config ([`TernaryConfig`]): how to pack.
        record ([`PackingRecord`]): takes note.

    Returns:
        `bool`: false if the layer is to stay in float (`rounding="recover"` and a weight that is not ternary).
    """
    matrix = weight.flatten(1)  # [N, K]; of a convolution [N, C * kh * kw]
    if isinstance(layer.spec, Int8Spec):
        layer.install_weight(quantize_int8(matrix, name=name))
        return True
    recovered = recover(matrix)
    if isinstance(recovered, TernaryWeight):
        layer.install_weight(recovered)
        if bool(matrix.any()):  # zeros fit everything; they are not a sign of a ternary model
            record.exact.append(name)
        return True
    if recovered is not None:
        record.almost[name] = recovered
    if config.rounding == RECOVER:
        record.kept.append(name)
        return False
    layer.install_weight(round_to(matrix, layer.spec, rounding=config.rounding, name=name))
    return True
