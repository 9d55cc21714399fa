# SPDX-License-Identifier: Apache-2.0
"""The name of the quantization method, as configs of models have it."""

# Without this package diffusers prints only this string ("Unknown quantization type, got …"): it says what to install.
QUANT_METHOD = "diffusers_ternary"
