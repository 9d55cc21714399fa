# SPDX-License-Identifier: Apache-2.0
"""Where diffusers and transformers look up quantization backends. Not documented API; part of `compat`.

Apart, because it is needed while the hosts are being imported.
"""

from typing import Any


def diffusers_registries() -> tuple[dict[str, Any], dict[str, Any]]:
    """Configs and quantizers of diffusers by the name of their method."""
    from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    return AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING


def transformers_registries() -> tuple[dict[str, Any], dict[str, Any]]:
    """Configs and quantizers of transformers by the name of their method."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    return AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
