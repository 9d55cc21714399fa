# SPDX-License-Identifier: Apache-2.0
"""Which format a path is in; the formats themselves are tested by name."""

import json

import pytest

from diffusers_ternary.interop.open_foreign import open_foreign


def test_a_packed_folder_is_to_be_exported(tmp_path):
    config = {"_class_name": "FluxTransformer2DModel", "quantization_config": {"quant_method": "diffusers_ternary"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"is packed already. To export it, say to what: to='gguf' or to='mflux'"):
        open_foreign(tmp_path)
