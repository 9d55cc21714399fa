# SPDX-License-Identifier: Apache-2.0
"""Speed: implementations of the ternary linear map, one package per device, all with the reference's signature."""
