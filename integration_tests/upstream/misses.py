# SPDX-License-Identifier: Apache-2.0
"""Upstream tests that fail with ternary models, and why: patterns of `CLASS.test[parameters]`, the first that fits."""

MISSES = {
    "*.test_helper[quantization_dtype_assignment]": "A packed model may be cast: codes stay as they are, and what is "
    "not packed changes, as `torch.nn.Module.to` promises. The test wants an error, as of backends that cannot.",
}
