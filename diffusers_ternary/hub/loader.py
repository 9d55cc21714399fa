# SPDX-License-Identifier: Apache-2.0
"""`ternary_pipeline.py` of a repository: loads it without the import line, for who trusts remote code."""

from .source import Source


LOADER = "ternary_pipeline.py"
"""Its name, which `custom_pipeline="ternary_pipeline"` finds."""

_TEXT = '''# SPDX-License-Identifier: Apache-2.0
"""Loads this repository without `import diffusers_ternary` in your code (the package must be installed):

    DiffusionPipeline.from_pretrained(REPO, custom_pipeline="ternary_pipeline", trust_remote_code=True)
"""

import diffusers_ternary  # noqa: F401 - registers the packed format
from diffusers import {name}


class Ternary{name}({name}):
    """The stock {name}; the import above is all that is new."""
'''


def has_loader(source: Source) -> bool:
    """Whether a repository gets the file: pipelines of diffusers' own classes do."""
    import diffusers

    found = getattr(diffusers, source.class_name, None)
    return source.is_pipeline and isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)


def loader_text(class_name: str) -> str:
    """The file for a pipeline class of diffusers.

    Args:
        class_name (`str`): e.g. `"FluxPipeline"`.
    """
    return _TEXT.format(name=class_name)
