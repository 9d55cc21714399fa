# SPDX-License-Identifier: Apache-2.0
"""How many tokens a picture or clip is inside the denoiser, and what decoding it takes, from configs."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from .parts import Part


# The longest prompt of the models in use (FLUX); where it is shorter, predictions are a little high.
TEXT_TOKENS = 512
_DOWNSAMPLING, _TEMPORAL = 8, 4
# At full resolution a decoder holds a convolution's input, its output, and the normalized input.
_DECODER_TENSORS = 3


@dataclasses.dataclass(frozen=True)
class Picture:
    """What is drawn.

    Args:
        pixels (`int`): of a side; of another shape, the square root of all.
        frames (`int`, *optional*, defaults to 1): of a clip.
        text_tokens (`int`, *optional*, defaults to 512): of the prompt.
    """

    pixels: int
    frames: int = 1
    text_tokens: int = TEXT_TOKENS

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{field.name}={value!r} is not a positive integer.")

    def tokens(self, denoiser: Part, parts: Iterable[Part]) -> int:
        """Tokens of a row inside the blocks, image and text together."""
        vae = next((_settings(part) for part in parts if part.decodes), {})
        side = max(1, self.pixels // _downsampling(vae) // _patch(_settings(denoiser), vae))
        return side**2 * self._latent_frames(vae) + self.text_tokens

    def decoding(self, part: Part, itemsize: int) -> int:
        """Bytes of activations while the autoencoder decodes without tiles."""
        vae = _settings(part)
        widths = vae.get("decoder_block_out_channels") or vae.get("block_out_channels")
        if not widths and "base_dim" in vae:
            widths = [vae["base_dim"] * factor for factor in vae.get("dim_mult", (1,))]
        if not widths:
            return 0
        # Clips are decoded one latent frame at a time.
        frames = 1 if self.frames == 1 else _frames_at_once(vae)
        return _DECODER_TENSORS * sorted(widths)[:2][-1] * self.pixels**2 * frames * itemsize

    def _latent_frames(self, vae: Mapping[str, Any]) -> int:
        return 1 + (self.frames - 1) // _frames_at_once(vae)


def _settings(part: Part) -> Mapping[str, Any]:
    config = getattr(part.model, "config", None)
    return dict(config) if isinstance(config, Mapping) else {}


def _frames_at_once(vae: Mapping[str, Any]) -> int:
    return int(vae.get("scale_factor_temporal") or _TEMPORAL)


def _downsampling(vae: Mapping[str, Any]) -> int:
    if vae.get("scale_factor_spatial"):
        return int(vae["scale_factor_spatial"])
    levels = vae.get("encoder_block_out_channels") or vae.get("block_out_channels") or vae.get("dim_mult")
    return 2 ** (len(levels) - 1) if levels else _DOWNSAMPLING


def _patch(denoiser: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
    """Side of a token in latents."""
    if "down_block_types" in denoiser:  # a UNet: where its attention begins
        return 1 if "Attn" in denoiser["down_block_types"][0] else 2
    size = denoiser.get("patch_size") or denoiser.get("all_patch_size") or 1
    patch = int(size if isinstance(size, int) else size[-1])
    latent = vae.get("latent_channels") or vae.get("z_dim")
    channels = denoiser.get("in_channels")
    # Some pipelines make patches of the latents before the denoiser sees them, and its patch_size is 1.
    if patch == 1 and latent and channels and channels >= 4 * latent:
        return int((channels // latent) ** 0.5)
    return patch
