# SPDX-License-Identifier: Apache-2.0
"""What every verb asks of prompts."""

import pytest

from diffusers_ternary.rollouts import check_prompts


def test_prompts_of_any_iterable_become_a_tuple():
    assert check_prompts(iter(["a", "b"])) == ("a", "b")


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ("a cat", TypeError, "prompts='a cat' is one string"),
        (None, TypeError, "prompts=None is not a list"),
        (3, TypeError, "prompts=3 is not a list"),
        ([1], TypeError, r"prompts\[0\]=1 is not a string"),
        ([], ValueError, "There are no prompts"),
        ([" "], ValueError, r"prompts\[0\]=' ' is empty"),
    ],
)
def test_impossible_prompts_are_named(prompts, error, message):
    with pytest.raises(error, match=message):
        check_prompts(prompts)
