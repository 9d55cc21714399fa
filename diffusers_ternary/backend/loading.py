# SPDX-License-Identifier: Apache-2.0
"""What both hosts share of loading and saving; `diffusers.py` and `transformers.py` hold their contracts."""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..layers import LayerRecord, QuantizedLayer
from .checkpoint import (
    PackedCheckpoint,
    check_headers,
    check_packed_as_declared,
    read_headers,
)
from .config import TernaryConfig
from .float8 import Float8Scales
from .foreign import check_float_checkpoint
from .pack import NOT_TERNARY, PackingRecord, pack_layer
from .placeholders import insert_packed, insert_placeholders
from .plan import plan_conversion
from .saving import state_dict_to_file
from .summary import packed_layers, summarize


logger = logging.getLogger(__name__)


class ModelLoading:
    """Base of both quantizers: reads headers, inserts layers, packs weights, and marks what was made.

    A checkpoint is either packed (`checkpoint`) or float (`plan`, `float8`).
    """

    quantization_config: TernaryConfig
    pre_quantized: bool

    def __init__(self, quantization_config: TernaryConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)  # type: ignore[call-arg] # of the host's quantizer
        self.source = "checkpoint"
        self.checkpoint: PackedCheckpoint | None = None
        # Of a float checkpoint whose headers were read.
        self.stored_names: frozenset[str] = frozenset()
        self.float8 = Float8Scales()
        self.kept: dict[str, str] = {}
        self.packing = PackingRecord()
        # Layers that were packed when the model was quantized; what is packed now, the model itself knows.
        self.once: frozenset[str] = frozenset()

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Rejects placements that would store float weights.

        Raises:
            ValueError: for disk offload while quantizing on the fly.
        """
        device_map = kwargs.get("device_map")
        if not self.pre_quantized and isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "device_map puts layers on disk while quantizing on the fly, which would store them unquantized. "
                "Quantize and save_pretrained first, then load the packed folder with this device_map."
            )

    def read_checkpoint(self, files: Sequence[str | os.PathLike[str]]) -> None:
        """Reads and checks the headers of a checkpoint, before any module is replaced.

        Raises:
            ValueError: if it is damaged, quantized by another method, or contradicts config.json.
        """
        layout, tensors = read_headers(files)
        self.source = os.path.dirname(os.fspath(files[0])) if files else self.source
        check_packed_as_declared(layout, declared=self.pre_quantized, source=self.source)
        if layout is not None:
            check_headers(layout, tensors, source=self.source)
            self.checkpoint = PackedCheckpoint(layout, tensors)
        else:
            self.float8 = check_float_checkpoint(tensors, source=self.source)
            self.stored_names = frozenset(tensors)  # none of pickled files, which have no headers

    def insert_layers(self, model: nn.Module) -> list[str]:
        """Puts packed layers without values, or placeholders, in the place of the float ones.

        Returns:
            `list[str]`: names of the placeholders, whose float weights are packed when they arrive.
        """
        config = self.quantization_config
        if self.checkpoint is not None:
            layers = self.checkpoint.layout.layers
            insert_packed(model, layers, self.checkpoint.scale_dtypes(), config, source=self.source)
            return []
        plan = plan_conversion(model, config)
        insert_placeholders(model, plan, config)
        self.kept = plan.kept
        return list(plan.kinds)

    def pack(self, model: nn.Module, name: str, weight: torch.Tensor, *, dtype: torch.dtype) -> nn.Module:
        """Packs a weight into its placeholder.

        Args:
            model (`nn.Module`): changed in place.
            name (`str`): of the placeholder.
            weight (`torch.Tensor`): float, as it is stored.
            dtype (`torch.dtype`): of a layer that is to stay in float.

        Returns:
            `nn.Module`: the packed layer, or the float one in its place (`rounding="recover"`).
        """
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantizedLayer)
        if pack_layer(layer, weight, name=name, config=self.quantization_config, record=self.packing):
            return layer
        kept = layer.float_module(weight.to(dtype), layer.bias)
        model.set_submodule(name, kept)
        self.kept[name] = NOT_TERNARY
        return kept

    def finish(self, model: nn.Module) -> None:
        """Marks a model whose weights have all arrived as quantized, and logs what was done.

        Raises:
            ValueError: if the weight of a layer has not arrived.
        """
        self.packing.report(model)
        for name, layer in packed_layers(model).items():
            if not layer.is_packed:
                raise ValueError(f"The checkpoint has no weight for {name}. Check that no shard is missing.")
        self.attach(model)
        logger.info("%s", summarize(model, self.kept))

    def attach(self, model: Any) -> None:
        """Remembers of a packed model what saving needs to know; hosts add how they know that it is quantized."""
        self.once = frozenset(packed_layers(model))
        self.checkpoint = None
        # What was loaded or made is packed now, whichever way it came.
        self.pre_quantized = True

    def to_file(
        self, state_dict: Mapping[str, torch.Tensor], records: Mapping[str, LayerRecord]
    ) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Tensors and metadata of the file that `save_pretrained` writes; see [`state_dict_to_file`]."""
        converted, layout = state_dict_to_file(state_dict, records, once=self.once)
        return converted, layout.to_metadata()

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on packed models; the packed weights themselves are frozen."""
        return True

    @property
    def is_compileable(self) -> bool:
        """`torch.compile(fullgraph=True)` works."""
        return True
