# SPDX-License-Identifier: Apache-2.0
"""What is converted and what is kept: exact lists on tiny models, shares of the parameters on the real shapes."""

import re

import diffusers
import pytest
import torch
from torch import nn

from diffusers_ternary import TernaryConfig
from diffusers_ternary.backend import plan_conversion
from diffusers_ternary.backend.policy import ARCHITECTURE_POLICIES, policy_for
from integration_tests.support import denoisers, text_encoders


def expand(text: str) -> set[str]:
    """One name a line; `{a b}` stands for each of its words, `#` for the number of a block."""
    names = set()
    for line in text.split("\n"):
        prefix, _, rest = line.strip().partition("{")
        if rest:
            names.update(prefix + word for word in rest.removesuffix("}").split())
        elif prefix:
            names.add(prefix)
    return names


def collapse(names) -> set[str]:
    return {".".join("#" if part.isdigit() else part for part in name.split(".")) for name in names}


# Model → (converted, kept).
LAYERS = {
    "flux": (
        """
        transformer_blocks.#.norm1.linear
        transformer_blocks.#.norm1_context.linear
        transformer_blocks.#.attn.{to_q to_k to_v to_out.# add_q_proj add_k_proj add_v_proj to_add_out}
        transformer_blocks.#.ff.{net.#.proj net.#}
        transformer_blocks.#.ff_context.{net.#.proj net.#}
        single_transformer_blocks.#.norm.linear
        single_transformer_blocks.#.{proj_mlp proj_out}
        single_transformer_blocks.#.attn.{to_q to_k to_v}
        """,
        """
        time_text_embed.timestep_embedder.{linear_1 linear_2}
        time_text_embed.guidance_embedder.{linear_1 linear_2}
        time_text_embed.text_embedder.{linear_1 linear_2}
        {context_embedder x_embedder proj_out}
        norm_out.linear
        """,
    ),
    "sd3": (
        """
        transformer_blocks.#.norm1.linear
        transformer_blocks.#.norm1_context.linear
        transformer_blocks.#.attn.{to_q to_k to_v add_k_proj add_v_proj add_q_proj to_out.# to_add_out}
        transformer_blocks.#.ff.{net.#.proj net.#}
        transformer_blocks.#.ff_context.{net.#.proj net.#}
        """,
        """
        time_text_embed.timestep_embedder.{linear_1 linear_2}
        time_text_embed.text_embedder.{linear_1 linear_2}
        {context_embedder proj_out}
        pos_embed.proj
        norm_out.linear
        """,
    ),
    "sana": (
        """
        transformer_blocks.#.attn1.{to_q to_k to_v to_out.#}
        transformer_blocks.#.attn2.{to_q to_k to_v to_out.#}
        transformer_blocks.#.ff.{conv_inverted conv_point}
        """,
        """
        patch_embed.proj
        transformer_blocks.#.ff.conv_depth
        time_embed.emb.timestep_embedder.{linear_1 linear_2}
        time_embed.linear
        caption_projection.{linear_1 linear_2}
        proj_out
        """,
    ),
    "pixart": (
        """
        transformer_blocks.#.attn1.{to_q to_k to_v to_out.#}
        transformer_blocks.#.attn2.{to_q to_k to_v to_out.#}
        transformer_blocks.#.ff.{net.#.proj net.#}
        """,
        """
        proj_out
        pos_embed.proj
        adaln_single.emb.timestep_embedder.{linear_1 linear_2}
        adaln_single.linear
        caption_projection.{linear_1 linear_2}
        """,
    ),
    "qwen_image": (
        """
        transformer_blocks.#.img_mod.#
        transformer_blocks.#.attn.{to_q to_k to_v add_k_proj add_v_proj add_q_proj to_out.# to_add_out}
        transformer_blocks.#.img_mlp.{net.#.proj net.#}
        transformer_blocks.#.txt_mod.#
        transformer_blocks.#.txt_mlp.{net.#.proj net.#}
        """,
        """
        time_text_embed.timestep_embedder.{linear_1 linear_2}
        {img_in txt_in proj_out}
        norm_out.linear
        """,
    ),
    "z_image": (
        """
        noise_refiner.#.attention.{to_q to_k to_v to_out.#}
        noise_refiner.#.feed_forward.{w1 w2 w3}
        context_refiner.#.attention.{to_q to_k to_v to_out.#}
        context_refiner.#.feed_forward.{w1 w2 w3}
        layers.#.attention.{to_q to_k to_v to_out.#}
        layers.#.feed_forward.{w1 w2 w3}
        """,
        """
        all_x_embedder.2-1
        all_final_layer.2-1.linear
        all_final_layer.2-1.adaLN_modulation.#
        noise_refiner.#.adaLN_modulation.#
        t_embedder.mlp.#
        cap_embedder.#
        layers.#.adaLN_modulation.#
        """,
    ),
    "sdxl_unet": (
        """
        down_blocks.#.attentions.{#.proj_in #.proj_out}
        down_blocks.#.attentions.#.transformer_blocks.#.attn1.{to_q to_k to_v to_out.#}
        down_blocks.#.attentions.#.transformer_blocks.#.attn2.{to_q to_k to_v to_out.#}
        down_blocks.#.attentions.#.transformer_blocks.#.ff.{net.#.proj net.#}
        up_blocks.#.attentions.{#.proj_in #.proj_out}
        up_blocks.#.attentions.#.transformer_blocks.#.attn1.{to_q to_k to_v to_out.#}
        up_blocks.#.attentions.#.transformer_blocks.#.attn2.{to_q to_k to_v to_out.#}
        up_blocks.#.attentions.#.transformer_blocks.#.ff.{net.#.proj net.#}
        mid_block.attentions.{#.proj_in #.proj_out}
        mid_block.attentions.#.transformer_blocks.#.attn1.{to_q to_k to_v to_out.#}
        mid_block.attentions.#.transformer_blocks.#.attn2.{to_q to_k to_v to_out.#}
        mid_block.attentions.#.transformer_blocks.#.ff.{net.#.proj net.#}
        down_blocks.#.resnets.#.{conv1 conv2 conv_shortcut}
        up_blocks.#.resnets.#.{conv1 conv2 conv_shortcut}
        mid_block.resnets.#.{conv1 conv2}
        down_blocks.#.downsamplers.#.conv
        up_blocks.#.upsamplers.#.conv
        """,
        """
        {conv_in conv_out}
        time_embedding.{linear_1 linear_2}
        add_embedding.{linear_1 linear_2}
        down_blocks.#.resnets.#.time_emb_proj
        up_blocks.#.resnets.#.time_emb_proj
        mid_block.resnets.#.time_emb_proj
        """,
    ),
    "wan": (
        """
        blocks.#.attn1.{to_q to_k to_v to_out.#}
        blocks.#.attn2.{to_q to_k to_v to_out.#}
        blocks.#.ffn.{net.#.proj net.#}
        """,
        """
        condition_embedder.time_embedder.{linear_1 linear_2}
        condition_embedder.time_proj
        condition_embedder.text_embedder.{linear_1 linear_2}
        proj_out
        """,
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_of_the_tiny_models(name):
    converted, kept = LAYERS[name]
    plan = plan_conversion(getattr(denoisers, name)(), TernaryConfig())
    assert collapse(plan.kinds) == expand(converted)
    assert collapse(plan.kept) == expand(kept)
    assert set(plan.kinds.values()) == {"ternary"}


# The real shape where it is not the class's default.
SHAPES = {
    "SD3Transformer2DModel": {
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 192,
    },
    "PixArtTransformer2DModel": {"caption_channels": 4096},
    "HiDreamImageTransformer2DModel": {
        "attention_head_dim": 128,
        "num_attention_heads": 20,
        "caption_channels": [4096, 4096],
        "num_layers": 16,
        "num_single_layers": 32,
        "llama_layers": list(range(48)),
        "num_routed_experts": 4,
        "num_activated_experts": 2,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "text_emb_dim": 2048,
        "axes_dims_rope": (64, 32, 32),
        "max_resolution": (128, 128),
    },
}

# Class → billions of parameters, percent converted. FLUX.1: 99.5 % is the figure of the 1.58-bit FLUX paper.
# Kandinsky 5 keeps its modulation in float32.
SHARES = {
    "FluxTransformer2DModel": (11.89, 99.5),
    "SD3Transformer2DModel": (2.03, 99.0),
    "QwenImageTransformer2DModel": (20.43, 99.8),
    "Flux2Transformer2DModel": (32.22, 97.5),
    "ZImageTransformer2DModel": (6.15, 97.7),
    "PixArtTransformer2DModel": (0.61, 97.3),
    "SanaTransformer2DModel": (1.60, 96.9),
    "WanTransformer3DModel": (14.29, 98.3),
    "Lumina2Transformer2DModel": (2.61, 99.7),
    "HiDreamImageTransformer2DModel": (17.1, 96.8),
    "AuraFlowTransformer2DModel": (6.83, 99.4),
    "ChromaTransformer2DModel": (8.90, 96.7),
    "HunyuanVideoTransformer3DModel": (12.82, 97.2),
    "LTXVideoTransformer3DModel": (1.92, 97.7),
    "CogVideoXTransformer3DModel": (1.69, 99.2),
    "Krea2Transformer2DModel": (12.82, 97.5),
    "BriaFibo2Transformer2DModel": (8.13, 97.9),
    "Kandinsky5Transformer3DModel": (2.15, 84.8),
    "UNet2DConditionModel": (0.87, 96.8),
}

EMBEDDERS = re.compile(
    r"(^|\.)((x|img|context|time|timestep|text|guidance|caption|cap|patch|image|t|p)_?(text_)?(embed\w*|in)"
    r"|norm_out|final_layer|proj_out_1|time_proj|caption_projection)(\.|$)"
)


@pytest.mark.parametrize("name", SHARES)
def test_share_of_the_parameters_of_the_real_shapes(name):
    with torch.device("meta"):
        model = getattr(diffusers, name)(**SHAPES.get(name, {}))
    plan = plan_conversion(model, TernaryConfig())
    total = sum(parameter.numel() for parameter in model.parameters())
    converted = sum(model.get_submodule(layer).weight.numel() for layer in plan.kinds)
    billions, percent = SHARES[name]
    assert total / 1e9 == pytest.approx(billions, rel=0.01)
    assert 100 * converted / total == pytest.approx(percent, abs=0.06)
    embedders = {layer for layer in collapse(plan.kinds) if EMBEDDERS.search(layer)}
    assert embedders == set(), "embedders are kept, wherever they are"


def test_modulation_is_decided_by_its_share():
    """Ternary where keeping it would cap the size ratio, kept where it is about 2 %."""
    for name, converted in [
        ("FluxTransformer2DModel", True),
        ("SD3Transformer2DModel", True),
        ("Lumina2Transformer2DModel", True),
        ("AuraFlowTransformer2DModel", True),
        ("ZImageTransformer2DModel", False),
        ("BriaFibo2Transformer2DModel", False),
    ]:
        with torch.device("meta"):
            model = getattr(diffusers, name)()
        plan = plan_conversion(model, TernaryConfig())
        modulation = re.compile(r"\.\d+\.(norm1(_context)?\.linear|adaLN_modulation\.\d)$")
        total = sum(parameter.numel() for parameter in model.parameters())
        layers = [layer for layer in (*plan.kinds, *plan.kept) if modulation.search(layer)]
        share = sum(model.get_submodule(layer).weight.numel() for layer in layers) / total
        assert all((layer in plan.kinds) == converted for layer in layers), name
        assert (share > 0.05) == converted, (name, share)


class Unknown(nn.Module):
    """An architecture that no table names."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Linear(12, 64)
        self.context_embedders = nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(8, 64)})])
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.norm_out = nn.Sequential(nn.SiLU(), nn.Linear(64, 128))
        self.proj_out = nn.Linear(64, 12)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.adaln = nn.Linear(64, 384)
        self.to_qkv = nn.Linear(64, 192)
        self.gate = nn.Linear(64, 256)  # of a gated feed-forward
        self.down = nn.Linear(256, 64)
        self.router = nn.Linear(64, 4)
        self.time_emb_proj = nn.Linear(64, 64)
        self.proj_out = nn.Linear(64, 64)


def test_the_default_for_unknown_architectures():
    plan = plan_conversion(Unknown(), TernaryConfig())
    assert collapse(plan.kinds) == expand("blocks.#.{adaln to_qkv gate down proj_out}")
    assert {name.replace("blocks.1", "blocks.0"): reason for name, reason in plan.kept.items()} == {
        "patch_embed": "outside the repeated blocks (embedders, final norm and projection)",
        "context_embedders.0.proj": "embeds the image, the timestep or the text",
        "blocks.0.router": "routes tokens to experts",
        "blocks.0.time_emb_proj": "embeds the timestep or the text",
        "norm_out.1": "outside the repeated blocks (embedders, final norm and projection)",
        "proj_out": "outside the repeated blocks (embedders, final norm and projection)",
    }


def test_text_encoders():
    plan = plan_conversion(text_encoders.t5(), TernaryConfig())
    assert collapse(plan.kinds) == expand(
        """encoder.block.#.layer.#.SelfAttention.{q k v o}
        encoder.block.#.layer.#.DenseReluDense.{wi_0 wi_1 wo}"""
    )
    assert plan.kept == {}
    plan = plan_conversion(text_encoders.clip_with_projection(), TernaryConfig())
    assert list(plan.kept) == ["text_projection"]


def test_every_class_of_the_table_exists():
    import transformers

    names = [name for policy in ARCHITECTURE_POLICIES for name in policy.classes]
    assert len(names) == len(set(names)), "a class has one policy"
    for name in names:
        assert hasattr(diffusers, name) or hasattr(transformers, name), name
        assert name in policy_for(name).classes
    assert policy_for("NoSuchModel").classes == ()
