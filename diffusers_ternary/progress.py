# SPDX-License-Identifier: Apache-2.0
"""The bar over what takes more than seconds: on stderr, with the time left, gone afterward."""

from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm


class Bar(tqdm):
    """A bar for this package's own work.

    Shown unless `diffusers.utils.logging.disable_progress_bar()` was called: a library obeys its host. Commands hide
    the hosts' bars and keep these ([`Bar.always`]).

    Args:
        items (`Iterable`, *optional*): what is gone through; `None` = `update()` is called.
        description (`str`): what is being done.
        total (`int`, *optional*): default: the length of `items`.
        visible (`bool`, *optional*, defaults to `True`): `False` shows nothing.
        leave (`bool`, *optional*, defaults to `False`): whether it stays on the screen.
    """

    always = False

    def __init__(
        self,
        items: Iterable[Any] | None = None,
        description: str | None = None,
        *,
        total: int | None = None,
        visible: bool = True,
        leave: bool = False,
    ) -> None:
        from diffusers.utils.logging import is_progress_bar_enabled

        hidden = not visible or not (Bar.always or is_progress_bar_enabled())
        # What is done within a second needs no bar.
        super().__init__(
            items, desc=description, total=total, leave=leave, disable=hidden, delay=1, dynamic_ncols=True
        )
