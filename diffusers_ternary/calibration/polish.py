# SPDX-License-Identifier: Apache-2.0
"""Polish: codes and scales of a whole layer move together, by gradients through softened codes."""

import dataclasses
import math

import torch

from .gptq import Coding


# Of the softmax, at the first and the last step; falls geometrically.
_TEMPERATURES = (0.5, 0.05)
_CODE_RATE, _SCALE_RATE = 0.1, 1e-3
# Logit of the code to start from, above the others: it holds 0.96 at the first temperature.
_CONFIDENCE = 2.0


def polish(
    target: torch.Tensor,
    hessian: torch.Tensor,
    coding: Coding,
    *,
    steps: int,
    outputs: torch.Tensor | None = None,
    seed: int = 0,
) -> Coding:
    """Gumbel-softmax over the three codes of every weight, with trained scales (GSQ, arXiv 2604.18556).

    A weight stands for its scale times the mean of its codes under a softmax of three logits, to which Gumbel noise
    is added. Adam lowers tr(A E H Eᵀ) while the temperature, and the noise with it, falls. What is left are the
    likeliest codes. Whether they are better than those of the start is for the caller to judge.

    A step takes two products of `[K, K]` and `[K, N]` (with A, one more of `[K, N]` and `[N, N]`); memory holds about
    15 numbers for every weight.

    Args:
        target (`torch.Tensor`): float `[K, N]`, the transposed weight.
        hessian (`torch.Tensor`): `[K, K]`, H.
        coding ([`Coding`]): codes and scales to start from. Left as it is.
        steps (`int`): of Adam.
        outputs (`torch.Tensor`, *optional*): `[N, N]`, A; `None` = the unit matrix.
        seed (`int`): of the noise, drawn on the CPU, so that no device changes it.

    Returns:
        [`Coding`]: of the same group size.
    """
    generator = torch.Generator().manual_seed(seed)
    columns = target.shape[0]
    # The middle code needs no logit: adding the same number to all three changes nothing.
    signs = torch.tensor([-1, 1], dtype=torch.int8, device=target.device).view(2, 1, 1)
    logits = _CONFIDENCE * ((coding.codes == signs).to(target) - (coding.codes == 0).to(target))  # [2, K, N]
    logits.requires_grad_()
    factors = torch.zeros_like(coding.scales).requires_grad_()  # logarithms, of what scales are multiplied by
    optimizer = torch.optim.Adam(
        [{"params": [logits], "lr": _CODE_RATE}, {"params": [factors], "lr": _SCALE_RATE}], betas=(0.9, 0.99)
    )
    # The gradient of a weight is then about 1, whatever the units of H.
    unit = 1.0 / float((hessian.diagonal()[:, None] * target.square()).mean().clamp_min(1e-30))
    first, last = (math.log(value) for value in _TEMPERATURES)
    for step in range(steps):
        temperature = math.exp(first + (last - first) * step / max(1, steps - 1))
        noise = torch.rand(3, *target.shape, generator=generator).clamp_(1e-6, 1 - 1e-6).log_().neg_().log_().neg_()
        noise = (temperature * noise).to(target)
        shares = torch.softmax(
            torch.stack([logits[0] + noise[0], noise[1], logits[1] + noise[2]]) / temperature, dim=0
        )
        scales = (coding.scales * factors.exp()).repeat_interleave(coding.group_size, dim=0)[:columns]
        weight = scales * (shares[2] - shares[0])
        gradient = hessian @ (weight.detach() - target)
        if outputs is not None:
            gradient = gradient @ outputs
        optimizer.zero_grad()
        weight.backward(unit * gradient)
        optimizer.step()
    likeliest = torch.stack([logits[0], torch.zeros_like(logits[0]), logits[1]]).argmax(dim=0) - 1
    scales = (coding.scales * factors.exp()).detach()
    return dataclasses.replace(coding, codes=likeliest.to(torch.int8), scales=scales)
