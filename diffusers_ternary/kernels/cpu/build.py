# SPDX-License-Identifier: Apache-2.0
"""How setuptools builds the C library; pyproject.toml names it, nothing imports it afterward."""

from typing import Any

from setuptools.command.build_ext import build_ext


class BuildLibrary(build_ext):
    """Leaves the library out where the compiler is MSVC, or MinGW, whose stack is not aligned for AVX.

    The sources are GNU C (attributes, vectors, assembly): MSVC would answer with a page of errors.
    """

    def build_extensions(self) -> None:
        """Compiles, or says why not."""
        if self.compiler.compiler_type != "unix":
            self.warn(
                f"the compiler ({self.compiler.compiler_type}) is neither gcc nor clang for this system: the CPU "
                "library is left out and plain torch serves. Wheels carry the library."
            )
            self.extensions: list[Any] = []
        super().build_extensions()
