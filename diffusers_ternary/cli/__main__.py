# SPDX-License-Identifier: Apache-2.0
"""`python -m diffusers_ternary.cli`."""

from .app import main


main()
