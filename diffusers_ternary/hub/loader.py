# SPDX-License-Identifier: Apache-2.0
"""`pipeline.py` of a repository: loads it without the import line, for who trusts remote code."""

LOADER = "pipeline.py"
"""Its name, which `custom_pipeline="pipeline"` finds."""

_TEXT = '''# SPDX-License-Identifier: Apache-2.0
"""Loads this repository without `import diffusers_ternary` in your code (the package must be installed):

    DiffusionPipeline.from_pretrained(REPO, custom_pipeline="pipeline", trust_remote_code=True)
"""

import diffusers_ternary  # noqa: F401 - registers the packed format
from diffusers import {name}


class Ternary{name}({name}):
    """The stock {name}; the import above is all that is new."""
'''


def loader_text(class_name: str) -> str:
    """The file for a pipeline class of diffusers.

    Args:
        class_name (`str`): e.g. `"FluxPipeline"`.
    """
    return _TEXT.format(name=class_name)
