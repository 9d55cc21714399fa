# SPDX-License-Identifier: Apache-2.0
"""Hashes of what results on disk were made from."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..progress import Bar


def weights_sha256(modules: dict[str, nn.Module]) -> str:
    """Hash of all parameters and buffers of a pipeline's modules: names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    states = ((component, module.state_dict()) for component, module in sorted(modules.items()))
    tensors = [(f"{component}.{name}", tensor) for component, state in states for name, tensor in state.items()]
    for name, tensor in Bar(tensors, "Hashing the weights"):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(data.numpy().data)
    return digest.hexdigest()


def prompts_sha256(prompts: Sequence[str]) -> str:
    """Hash of prompts, in order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        data = prompt.encode("utf-8")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def fingerprint(**parts: Any) -> str:
    """Hash of everything that the codes depend on, given as JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()
