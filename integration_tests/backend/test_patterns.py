# SPDX-License-Identifier: Apache-2.0
"""How patterns name modules."""

import pytest

from diffusers_ternary.backend.patterns import matches, matches_any


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("proj_out", "proj_out", True),
        ("proj_out", "blocks.3.proj_out", True),
        ("proj_out", "proj_out.0", True),
        ("proj_out", "proj_out_2", False),
        ("proj_out", "my_proj_out", False),
        ("blocks.3", "blocks.3.attn.to_q", True),
        ("blocks.3", "blocks.30.attn.to_q", False),
        ("blocks.3", "transformer_blocks.3.attn.to_q", False),
        ("attn.to_q", "blocks.3.attn.to_q", True),
        ("attn.to_q", "blocks.3.attn.norm.to_q", False),
        ("*.to_q", "blocks.3.attn.to_q", True),
        ("*.to_q", "blocks.3.attn.to_q.lora", False),
        ("blocks.?.attn.*", "blocks.3.attn.to_q", True),
        ("blocks.?.attn.*", "blocks.30.attn.to_q", False),
        ("blocks.[0-3].*", "blocks.2.ff", True),
        ("blocks.[0-3].*", "blocks.4.ff", False),
        ("*", "anything.at.all", True),
        ("*.TO_Q", "blocks.3.to_q", False),
        ("to.q", "to_q", False),
        (".", "a.b", False),
    ],
)
def test_matches(pattern, name, expected):
    assert matches(pattern, name) is expected


def test_matches_any():
    assert matches_any(["x", "to_q"], "blocks.0.to_q")
    assert not matches_any(["x", "y"], "blocks.0.to_q")
    assert not matches_any([], "blocks.0.to_q")
