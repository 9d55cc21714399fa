# SPDX-License-Identifier: Apache-2.0
"""CLIP score from a local checkpoint."""

import os
from collections.abc import Sequence

import torch
from PIL import Image

from ..progress import Bar


class ClipScore:
    """Mean of max(100 * cos(image, prompt), 0) in CLIP's embedding space (Hessel et al. 2021, without their factor).

    A scorer for [`evaluate`]: `scorers={"clip_score": ClipScore("path/to/clip")}`. CLIP hides small mistakes:
    report it beside a measure of prompt following. Prompts beyond the text model's length are cut.

    Args:
        checkpoint (`str` or `os.PathLike`): folder with a CLIP model and its processor, or the id of a Hub model that
            is in the local cache. Nothing is downloaded.
        batch_size (`int`, *optional*, defaults to 16): images at once.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): where the model runs.
        progress (`bool`, *optional*, defaults to `True`): show a progress bar on stderr.

    Raises:
        ValueError: if the checkpoint cannot be loaded.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str],
        *,
        batch_size: int = 16,
        device: str | torch.device = "cpu",
        progress: bool = True,
    ) -> None:
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        self.batch_size, self.progress = batch_size, progress
        self.device = torch.device(device)
        try:
            self.model = CLIPModel.from_pretrained(checkpoint, local_files_only=True).to(self.device).eval()
            self.tokenizer = CLIPTokenizer.from_pretrained(checkpoint, local_files_only=True)
            # The variant on Pillow: the other one needs torchvision.
            self.image_processor = CLIPImageProcessorPil.from_pretrained(checkpoint, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{os.fspath(checkpoint)} is not a local CLIP checkpoint ({error}). Give a folder of the model, "
                "its tokenizer and its image processor."
            ) from error

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> float:
        """Scores images against their prompts."""
        length = self.model.config.text_config.max_position_embeddings
        total = 0.0
        for start in Bar(range(0, len(images), self.batch_size), "CLIP score", visible=self.progress):
            part = slice(start, start + self.batch_size)
            text = self.tokenizer(
                list(prompts[part]), padding=True, truncation=True, max_length=length, return_tensors="pt"
            )
            pixels = self.image_processor(images=list(images[part]), return_tensors="pt")["pixel_values"]
            output = self.model(pixel_values=pixels.to(self.device), **text.to(self.device))
            # Both embeddings come normalized.
            cosine = (output.image_embeds.double() * output.text_embeds.double()).sum(dim=-1)
            total += float((100 * cosine).clamp(min=0).sum())
        return total / len(images)
