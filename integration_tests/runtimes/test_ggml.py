# SPDX-License-Identifier: Apache-2.0
"""Every GGUF type, architecture and group size against GGML's own reader and dequantizers, bit by bit."""

import functools
from collections import Counter

import numpy as np
import pytest
import torch

from diffusers_ternary import TernaryConfig, quantize
from diffusers_ternary.backend.packed_folder import PackedFolder
from diffusers_ternary.interop import export_gguf
from diffusers_ternary.interop.gguf_names import gguf_tensors
from integration_tests.support import denoisers
from integration_tests.support.ggml import library_path, read_with_ggml


pytest.importorskip("gguf")
pytestmark = pytest.mark.skipif(
    library_path() is None, reason="GGML is not installed: pip install 'diffusers-ternary[runtimes]'"
)
# All packed layers have inputs of a multiple of 256.
MAKERS = {
    "flux": denoisers.flux,
    "flux2": denoisers.flux2,
    "sd35": denoisers.sd35_medium,
    "z_image": functools.partial(denoisers.z_image, 12, (16, 24, 24), layers=1),
    "qwen_image": functools.partial(denoisers.qwen_image, 4, (16, 24, 24)),
}
TYPES = {64: ("q2_0", "q4_0"), 128: ("q2_0", "q4_0"), 256: ("tq2_0", "tq1_0", "q2_0"), None: ("tq2_0", "q2_0", "q4_0")}


@pytest.mark.parametrize("group_size", TYPES)
@pytest.mark.parametrize("architecture", MAKERS)
def test_no_weight_differs(tmp_path, architecture, group_size) -> None:
    torch.manual_seed(0)
    config = TernaryConfig(group_size=group_size, scale_layout="group", overrides={"*.norm1.linear": "int8"})
    quantize(MAKERS[architecture]().to(torch.bfloat16), config).save_pretrained(tmp_path / "in")
    model = PackedFolder.open(tmp_path / "in")
    tensors = gguf_tensors(model.class_name, model.names())
    exact = {tensor.name: tensor.join([model.dequantize(name) for name in tensor.parts]).numpy() for tensor in tensors}
    for kind in TYPES[group_size]:
        report = export_gguf(tmp_path / "in", tmp_path / f"{kind}.gguf", ternary_type=kind)
        found: Counter[str] = Counter()
        for name, stored_as, values in read_with_ggml(tmp_path / f"{kind}.gguf"):
            assert np.array_equal(values, exact[name].reshape(-1)), name
            found[stored_as] += 1
        assert found == Counter(report.types)
        assert found[kind] > 3
