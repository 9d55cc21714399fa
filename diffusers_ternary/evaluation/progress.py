# SPDX-License-Identifier: Apache-2.0
"""The bar over what takes more than seconds: drawing, judging, replaying, measuring, writing."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track


ItemT = TypeVar("ItemT")


def bar(items: Sequence[ItemT], description: str, *, visible: bool = True) -> Iterable[ItemT]:
    """The items, with their share and the time left on stderr while they are taken; gone afterward."""
    return track(items, description=description, console=Console(stderr=True), transient=True, disable=not visible)
