# SPDX-License-Identifier: Apache-2.0
"""The tables of `examples/README.md`: what published pipelines take as ternary, predicted; nothing is downloaded.

    python examples/sizes.py               # prints the tables
    python examples/sizes.py --write       # writes them into examples/README.md
    python examples/sizes.py --only FLUX.1-dev

The models are built on the meta device from their published configurations, and `diffusers_ternary.planning` predicts
what `diffusers-ternary plan` would.
"""

import argparse
import dataclasses
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import diffusers
import torch
import transformers
from torch import nn

from diffusers_ternary import TernaryConfig
from diffusers_ternary.planning import Part, plan_parts
from diffusers_ternary.planning.durations import Durations
from diffusers_ternary.planning.estimates import ModelEstimate
from diffusers_ternary.planning.picture import Picture


README = Path(__file__).with_name("README.md")


def _clip_l() -> nn.Module:
    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
        )
    )


def _clip_g() -> nn.Module:
    return transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(
            hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280
        )
    )


XXL = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": False,
}


def _t5_xxl() -> nn.Module:
    return transformers.T5EncoderModel(transformers.T5Config(vocab_size=32128, **XXL))


def _umt5_xxl() -> nn.Module:
    return transformers.UMT5EncoderModel(transformers.UMT5Config(vocab_size=256384, **XXL))


def _qwen3_4b() -> nn.Module:
    return transformers.Qwen3Model(
        transformers.Qwen3Config(
            hidden_size=2560,
            intermediate_size=9728,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=151936,
        )
    )


def _qwen2_5_vl_7b() -> nn.Module:
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config={
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
                "vocab_size": 152064,
            },
            vision_config={"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584},
        )
    )


def _gemma2_2b() -> nn.Module:
    return transformers.Gemma2Model(
        transformers.Gemma2Config(
            hidden_size=2304,
            intermediate_size=9216,
            num_hidden_layers=26,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=256,
            vocab_size=256000,
        )
    )


def _kl(latent: int) -> nn.Module:
    """The autoencoder of Stable Diffusion XL (4 latents) and of FLUX.1, SD 3.5 and Z-Image (16)."""
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=latent,
    )


def _flux_1() -> dict[str, nn.Module]:
    return {
        "transformer": diffusers.FluxTransformer2DModel(guidance_embeds=True),
        "text_encoder": _clip_l(),
        "text_encoder_2": _t5_xxl(),
        "vae": _kl(16),
    }


def _flux_2_klein() -> dict[str, nn.Module]:
    transformer = diffusers.Flux2Transformer2DModel(
        num_layers=5,
        num_single_layers=20,
        num_attention_heads=24,
        attention_head_dim=128,
        joint_attention_dim=7680,
        in_channels=128,
        guidance_embeds=False,
    )
    return {"transformer": transformer, "text_encoder": _qwen3_4b(), "vae": diffusers.AutoencoderKLFlux2()}


def _z_image() -> dict[str, nn.Module]:
    return {"transformer": diffusers.ZImageTransformer2DModel(), "text_encoder": _qwen3_4b(), "vae": _kl(16)}


def _qwen_image() -> dict[str, nn.Module]:
    return {
        "transformer": diffusers.QwenImageTransformer2DModel(),
        "text_encoder": _qwen2_5_vl_7b(),
        "vae": diffusers.AutoencoderKLQwenImage(),
    }


def _sana() -> dict[str, nn.Module]:
    widths = (128, 256, 512, 512, 1024, 1024)
    autoencoder = diffusers.AutoencoderDC(encoder_block_out_channels=widths, decoder_block_out_channels=widths)
    return {
        "transformer": diffusers.SanaTransformer2DModel(),
        "text_encoder": _gemma2_2b(),
        "vae": autoencoder,
    }


def _sd_3_5_large() -> dict[str, nn.Module]:
    transformer = diffusers.SD3Transformer2DModel(
        num_layers=38,
        num_attention_heads=38,
        attention_head_dim=64,
        caption_projection_dim=2432,
        joint_attention_dim=4096,
        pooled_projection_dim=2048,
        pos_embed_max_size=192,
        qk_norm="rms_norm",
    )
    encoders = {"text_encoder": _clip_l(), "text_encoder_2": _clip_g(), "text_encoder_3": _t5_xxl()}
    return {"transformer": transformer, **encoders, "vae": _kl(16)}


def _sdxl() -> dict[str, nn.Module]:
    unet = diffusers.UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    return {"unet": unet, "text_encoder": _clip_l(), "text_encoder_2": _clip_g(), "vae": _kl(4)}


def _wan_2_2() -> dict[str, nn.Module]:
    return {
        "transformer": diffusers.WanTransformer3DModel(),
        "transformer_2": diffusers.WanTransformer3DModel(),
        "text_encoder": _umt5_xxl(),
        "vae": diffusers.AutoencoderKLWan(),
    }


SQUARE, CLIP = Picture(1024), Picture(632, frames=81)  # 832 x 480 pixels


@dataclasses.dataclass(frozen=True)
class Published:
    """A published pipeline.

    Args:
        models (`Callable`): builds its models.
        steps (`int`): denoising steps that it is drawn with.
        forwards (`int`): of each: two with classifier-free guidance.
        picture ([`Picture`]): what it draws.
    """

    models: Callable[[], dict[str, nn.Module]]
    steps: int
    forwards: int = 1
    picture: Picture = SQUARE


PIPELINES = {
    "FLUX.1-dev": Published(_flux_1, 28),
    "FLUX.2-klein-4B": Published(_flux_2_klein, 4),
    "Z-Image-Turbo": Published(_z_image, 9),
    "Qwen-Image": Published(_qwen_image, 50, 2),
    "SANA-1.6B": Published(_sana, 20, 2),
    "SD-3.5-large": Published(_sd_3_5_large, 28, 2),
    "SDXL": Published(_sdxl, 30, 2),
    "Wan2.2-T2V-A14B": Published(_wan_2_2, 40, 2, CLIP),
}
# What the hours stand for.
CALIBRATION_PROMPTS, DISTILLATION_PROMPTS, UPDATES, ROWS = 128, 4000, 2000, 32
_FLOPS = 200e12  # a second, of which an H100 has 990 in 16 bits


def published(name: str) -> dict[str, Part]:
    """The models of a published pipeline, on the meta device."""
    with torch.device("meta"):
        models = PIPELINES[name].models()
    return {component: Part.of_model(component, model) for component, model in models.items()}


def row(name: str) -> list[str]:
    """The line of a pipeline."""
    parts, entry = published(name), PIPELINES[name]
    plan = plan_parts(parts, source=name, picture=entry.picture)
    largest = max(plan.denoisers, key=lambda part: part.source)
    sizes = [
        sum(part.source for part in plan.denoisers),
        sum(part.file for part in plan.denoisers),
        sum(part.file for part in plan.components if part.name.startswith("text_encoder")),
        plan.drawing,
        dataclasses.replace(plan, offload=True).drawing,
        max(part.quantizing for part in plan.components),
        largest.calibrating or 0,
        *(largest.distilling[mode] for mode in ("scales", "lora", "blockwise", "full")),
    ]
    return [
        name,
        *(f"{size / 1e9:.1f}" for size in sizes),
        *(f"{float(f'{hours:.2g}'):g}" for hours in _hours(parts, entry)),
    ]


def _hours(parts: dict[str, Part], entry: Published) -> tuple[float, float]:
    """Of one GPU, to gather the statistics of calibration in one pass, and to distill."""
    denoiser = next(part for part in parts.values() if part.denoises)
    calls = entry.steps * entry.forwards
    durations = Durations(denoiser, parts.values(), entry.picture, calls=calls, rate=_FLOPS)
    distilling = durations.drawing(DISTILLATION_PROMPTS) + durations.training(UPDATES, ROWS)
    return durations.gathering(CALIBRATION_PROMPTS) / 3600, distilling / 3600


def table(names: Iterable[str]) -> str:
    """Markdown; GB, and hours."""
    sizes = [
        "denoiser in 16 bits",
        "ternary file",
        "text encoders",
        "draw",
        "draw, offloaded",
        "quantize",
        "calibrate",
    ]
    modes = [f"distill `{mode}`" for mode in ("scales", "lora", "blockwise", "full")]
    heading = ["", *sizes, *modes, "hours to calibrate", "hours to distill"]
    rows = [heading, ["---", *["--:"] * (len(heading) - 1)], *map(row, names)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def encoders(names: Iterable[str]) -> str:
    """Markdown: files of the largest text encoder of each pipeline, in GB. A kind that is in two is listed once."""
    rows = {}
    for name in names:
        part = max((part for part in published(name).values() if part.encodes_text), key=lambda part: part.bytes)
        files = [ModelEstimate(part, TernaryConfig(kind=kind)).file for kind in ("int8", "ternary")]
        sizes = part.bytes, *files
        rows.setdefault((type(part.model).__name__, sizes), []).append(name)
    heading = ["largest text encoder", "16 bits", "int8", "ternary"]
    lines = [
        [f"{', '.join(users)}: {model}", *(f"{size / 1e9:.2f}" for size in sizes)]
        for (model, sizes), users in rows.items()
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heading, ["---", *["--:"] * 3], *lines])


TABLES = {"sizes.py": table, "sizes.py, text encoders": encoders}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PIPELINES, default=list(PIPELINES))
    parser.add_argument("--write", action="store_true", help="write the tables into README.md beside this file")
    options = parser.parse_args()
    for name, make in TABLES.items():
        made, begin, end = make(options.only), f"<!-- {name} -->", f"<!-- end of {name} -->"
        print(made, end="\n\n")
        if options.write:
            text = README.read_text(encoding="utf-8")
            text = re.sub(f"{begin}.*?{end}", lambda _, new=f"{begin}\n{made}\n{end}": new, text, flags=re.DOTALL)
            README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
