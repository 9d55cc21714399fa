# SPDX-License-Identifier: Apache-2.0
"""Less output from the libraries, for commands that print a result of their own."""


def hide_loading_bars() -> None:
    """Hides the loading bars of diffusers and transformers, and what is not an error, for the rest of the process."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
