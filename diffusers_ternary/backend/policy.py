# SPDX-License-Identifier: Apache-2.0
"""Which modules of which architectures stay in high precision, and why.

The rule for every architecture, known or not: linear layers and convolutions inside repeated blocks are ternary,
depthwise and grouped convolutions (1 % of the weights of SANA) and everything outside the blocks is kept. Outside are
the patch, text, time and guidance embedders, the final norm's modulation and the final projection: 0.2 to 3 % of the
weights, and by far the most sensitive ones per weight (x_embedder 241, final projection 112, time MLP 1.8, against
0.04 to 0.13 for the linears of a block, in velocity error per share of the parameters). On top of that:

- *adaLN modulation inside the blocks* is 27 to 33 % of FLUX.1, Stable Diffusion 3 and Qwen-Image, so keeping it in
  16 bits would cap the size ratio at about 3.4x: it is ternary there, and in every other architecture where it is
  more than a few percent. Where it is 2 % (Z-Image) it is kept: precision that costs nothing.
- *embedders inside blocks* (time projections of UNet resnets, routers of mixtures of experts) are kept.

The shares are asserted on the real architectures in `integration_tests/backend/test_policy.py`.
"""

import dataclasses
import re

from ..layers import FloatLayer, matrix_shape
from .patterns import matches_any


@dataclasses.dataclass(frozen=True)
class KeepRule:
    """Modules that stay in high precision, and the reason that is shown to people.

    Args:
        patterns (`tuple[str, ...]`): names of modules, see [`matches`].
        reason (`str`): why.
        narrowing (`bool`, *optional*, defaults to `False`): only layers with fewer outputs than inputs.
    """

    patterns: tuple[str, ...]
    reason: str
    narrowing: bool = False

    def applies(self, name: str, module: FloatLayer) -> bool:
        """Whether the rule keeps this layer."""
        rows, columns = matrix_shape(module)
        return matches_any(self.patterns, name) and not (self.narrowing and rows >= columns)


@dataclasses.dataclass(frozen=True)
class ArchitecturePolicy:
    """Policy of one or more model classes.

    Args:
        classes (`tuple[str, ...]`): class names this policy is for; empty for the default.
        keep (`tuple[KeepRule, ...]`): rules for modules inside blocks.
        outside (`str`): why modules outside blocks are kept.
        ignore_keep_in_fp32 (`tuple[str, ...]`): entries of the class's `_keep_in_fp32_modules` that are converted
            all the same.
    """

    classes: tuple[str, ...] = ()
    keep: tuple[KeepRule, ...] = ()
    outside: str = "outside the repeated blocks (embedders, final norm and projection)"
    ignore_keep_in_fp32: tuple[str, ...] = ()

    def reason_to_keep(self, name: str, module: FloatLayer) -> str | None:
        """Why the layer `module` of this name stays in high precision, or `None` if it is to be converted."""
        if not is_in_block(name):
            return self.outside
        for rule in (*COMMON_RULES, *self.keep):
            if rule.applies(name, module):
                return rule.reason
        return None


# A module is in a block if its path has a number: an element of a ModuleList or Sequential of blocks.
_IN_BLOCK = re.compile(r"\.\d+\.")


def is_in_block(name: str) -> bool:
    """Whether the module lies inside a numbered, repeated block."""
    return _IN_BLOCK.search(name) is not None


COMMON_RULES = (
    KeepRule(
        (
            "time_emb_proj",
            "time_embedding",
            "time_embedder",
            "timestep_embedder",
            "t_embedder",
        ),
        "embeds the timestep or the text",
    ),
    KeepRule(
        # Lists of embedders: their elements are numbered, but they are not blocks.
        (
            "*embedder.*",
            "*embedders.*",
            "*embedding.*",
            "*embedding_*",
            "*_embed.*",
            "*_emb.*",
            "*caption_projection*",
            "*patchify*",
        ),
        "embeds the image, the timestep or the text",
    ),
    # A router has one output per expert; the gate of a gated feed-forward (Krea 2) has more outputs than inputs.
    KeepRule(("gate", "router"), "routes tokens to experts", narrowing=True),
    KeepRule(("norm_out", "*final_layer*"), "final norm and projection"),
)

_SMALL_MODULATION = KeepRule(
    ("adaLN_modulation",),
    "adaLN modulation, about 2 % of the weights",
)

ARCHITECTURE_POLICIES = (
    # Modulation is ternary: FLUX.1 27.1 % of the weights, SD3 33.0 %, Qwen-Image 33.3 %.
    # AuraFlow 33.1 %, Lumina 2 10.1 %.
    ArchitecturePolicy(("FluxTransformer2DModel",)),
    ArchitecturePolicy(("SD3Transformer2DModel", "SD3ControlNetModel")),
    ArchitecturePolicy(("QwenImageTransformer2DModel",)),
    ArchitecturePolicy(("AuraFlowTransformer2DModel",)),
    ArchitecturePolicy(("Lumina2Transformer2DModel",)),
    # One small network makes the modulation of every block from the timestep, and has numbered layers of its own.
    ArchitecturePolicy(
        ("ChromaTransformer2DModel",),
        (KeepRule(("distilled_guidance_layer",), "makes the modulation of all blocks, 3 % of the weights"),),
    ),
    # Modulation is shared by all blocks or made outside of them: nothing to decide.
    ArchitecturePolicy(("Flux2Transformer2DModel",)),
    ArchitecturePolicy(("PixArtTransformer2DModel", "SanaTransformer2DModel")),
    ArchitecturePolicy(("WanTransformer3DModel", "LTXVideoTransformer3DModel")),
    # Modulation is small: kept.
    ArchitecturePolicy(("ZImageTransformer2DModel", "BriaFibo2Transformer2DModel"), (_SMALL_MODULATION,)),
    # UNets: the projections that inject the time embedding into the residual blocks are covered by COMMON_RULES.
    ArchitecturePolicy(("UNet2DConditionModel", "ControlNetModel")),
    # transformers lists `wo` of T5 as float32 for the sake of float16 activations; its weight itself may be coded.
    ArchitecturePolicy(
        ("T5EncoderModel", "UMT5EncoderModel"),
        ignore_keep_in_fp32=("wo",),
        outside="outside the repeated blocks (token embedding, head)",
    ),
)
DEFAULT_POLICY = ArchitecturePolicy()


def policy_for(class_name: str) -> ArchitecturePolicy:
    """Policy of a model class; the default one for classes that are not in the table."""
    for policy in ARCHITECTURE_POLICIES:
        if class_name in policy.classes:
            return policy
    return DEFAULT_POLICY
