# SPDX-License-Identifier: Apache-2.0
"""Predicted bytes of one model: its file, and the memory of every step of the way.

Layers are counted by `backend/sizes.py` and training by `distillation/memory.py`; here they are put together with what
was measured around them (`integration_tests/benchmarks/real_size.py`).
"""

import dataclasses
import functools

import torch
from diffusers import ModelMixin

from ..backend import plan_conversion
from ..backend.compat import keep_in_fp32_names
from ..backend.config import TernaryConfig
from ..backend.plan import layer_spec
from ..backend.sizes import file_bytes, memory_bytes
from ..calibration.statistics import InputGroup
from ..distillation.config import MODES, DistillConfig
from ..distillation.memory import FLOAT32, estimate_memory, forward_activations
from ..format import LayerSpec
from ..layers import FLOAT_TYPES
from .parts import Part


LIBRARIES = 470_000_000  # interpreter, torch and the hosts, as real_size.py found them; a GPU's context is alike
_STORED = 2  # bytes of a value that is not packed, in files
_FLOAT32_COPIES = 3  # of a layer while it is packed: the weight, the weight over its scales, the codes
_STATISTICS = 8 * 10**9  # what calibration gathers at a time, unless one layer needs more


@dataclasses.dataclass(frozen=True)
class ModelEstimate:
    """Predicted bytes of one model.

    Args:
        part ([`Part`]): the model.
        config ([`TernaryConfig`], *optional*): how it is converted; `None` = it stays as it is.
        dtype (`torch.dtype`): of the computation and of what is not packed.
    """

    part: Part
    config: TernaryConfig | None
    dtype: torch.dtype = torch.bfloat16

    @property
    def kind(self) -> str:
        """What its layers become that the policy converts: `"float"`, `"int8"` or `"ternary"`."""
        return "float" if self.config is None else self.config.kind

    @functools.cached_property
    def specs(self) -> dict[str, LayerSpec]:
        """What the converted layers become.

        Raises:
            ValueError: if there is nothing to convert.
        """
        if self.config is None:
            return {}
        specs = {}
        for name, kind in plan_conversion(self.part.model, self.config).kinds.items():
            module = self.part.model.get_submodule(name)
            assert isinstance(module, FLOAT_TYPES)
            specs[name] = layer_spec(kind, module, self.config)
        return specs

    @property
    def file(self) -> int:
        """Bytes of the tensors in its files."""
        if self.config is None:
            return self.part.bytes
        return self._kept(_STORED) + sum(map(file_bytes, self.specs.values()))

    @property
    def memory(self) -> int:
        """Bytes of its parameters in memory."""
        return self._kept(self.dtype.itemsize) + sum(map(memory_bytes, self.specs.values()))

    def _kept(self, itemsize: int) -> int:
        count = self.part.weights - sum(spec.weights for spec in self.specs.values())
        return itemsize * count + max(0, FLOAT32 - itemsize) * self._in_float32

    @functools.cached_property
    def _in_float32(self) -> int:
        """Values that the model class keeps in float32 in any case, and that are not packed."""
        if not isinstance(self.part.model, ModelMixin):
            return 0
        names = set(keep_in_fp32_names(self.part.model))
        found = {
            name: each.numel()
            for name, each in self.part.model.named_parameters()
            if names.intersection(name.split("."))
        }
        return sum(count for name, count in found.items() if name.removesuffix(".weight") not in self.specs)

    @property
    def quantizing(self) -> int:
        """Peak while it is quantized on the fly: one file of the source, the packed model, the layer in hand."""
        largest = max((spec.weights for spec in self.specs.values()), default=0)
        return LIBRARIES + self.part.largest_file + self.memory + _FLOAT32_COPIES * FLOAT32 * largest

    @property
    def loading(self) -> int:
        """Peak while the packed model is loaded, above the libraries: it and its file."""
        return self.memory + self.file

    def activations(self, tokens: int) -> int:
        """Bytes of activations for one row of a forward without gradients."""
        return forward_activations(self.part.model, self._ternary, tokens=tokens, dtype=self.dtype)

    def drawing(self, tokens: int) -> int:
        """Peak of a denoising step, loading included, above the libraries."""
        return self.memory + max(self.file, self.activations(tokens))

    @property
    def statistics(self) -> int:
        """Bytes of statistics that calibration is told to gather at a time; every layer counts as if its input were
        its own."""
        groups = [
            InputGroup((name,), spec.in_features, (spec.out_features,)).bytes(torch.float32)
            for name, spec in self.specs.items()
        ]
        return min(sum(groups), max(_STATISTICS, *groups))

    def calibrating(self, tokens: int) -> int:
        """Peak of calibration with offloading: the float model, statistics, packed layers, and the activations that
        the backward of a call needs."""
        kept = DistillConfig(batch_size=1, block_weight=0.0)
        backward = estimate_memory(self.part.model, self._ternary, kept, tokens=tokens, dtype=self.dtype)
        return (
            LIBRARIES
            + self.dtype.itemsize * self.part.weights
            + (self.memory + self.statistics + backward.activations)
        )

    def distilling(self, tokens: int) -> dict[str, int]:
        """Peak of distillation by mode, one row at a time."""
        found = {}
        for mode in MODES:
            config = DistillConfig(mode=mode, batch_size=1, gradient_checkpointing=True)
            estimate = estimate_memory(self.part.model, self._ternary, config, tokens=tokens, dtype=self.dtype)
            found[mode] = estimate.total
        return found

    @property
    def _ternary(self) -> TernaryConfig:
        """What tells the blocks of a denoiser, whatever it becomes."""
        return self.config if self.config is not None and self.config.kind == "ternary" else TernaryConfig()
