# SPDX-License-Identifier: Apache-2.0
"""Every GGUF type, architecture and group size against GGML's own reader and dequantizers, bit by bit."""

from collections import Counter

import pytest
import torch

from diffusers_ternary.interop import export_gguf
from integration_tests.support import exports
from integration_tests.support.ggml import library_path, read_with_ggml


pytest.importorskip("gguf")
pytestmark = pytest.mark.skipif(
    library_path() is None, reason="GGML is not installed: pip install 'diffusers-ternary[runtimes]'"
)
TYPES = {64: ("q2_0", "q4_0"), 128: ("q2_0", "q4_0"), 256: ("tq2_0", "tq1_0", "q2_0"), None: ("tq2_0", "q2_0", "q4_0")}


@pytest.mark.parametrize("group_size", TYPES)
@pytest.mark.parametrize("architecture", exports.GGUF)
def test_no_weight_differs(tmp_path, architecture, group_size) -> None:
    exact = exports.pack(tmp_path / "in", architecture, group_size=group_size)
    for kind in TYPES[group_size]:
        report = export_gguf(tmp_path / "in", tmp_path / f"{kind}.gguf", ternary_type=kind)
        found: Counter[str] = Counter()
        for name, stored_as, values in read_with_ggml(tmp_path / f"{kind}.gguf"):
            assert torch.equal(torch.from_numpy(values.copy()), exact[name].reshape(-1)), name
            found[stored_as] += 1
        assert found == Counter(report.types)
        assert found[kind] > 3
