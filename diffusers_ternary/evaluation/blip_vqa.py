# SPDX-License-Identifier: Apache-2.0
"""BLIP-VQA: how sure a visual question answering model is that a phrase describes a picture."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from .checkpoints import load_model, load_part


class BlipVqa:
    """Answers "PHRASE?" with the probability of "yes" among "yes" and "no" (Huang et al., arXiv:2307.06350, 4.1).

    Args:
        checkpoint (`str` or `os.PathLike`): local folder or Hub id of a BLIP question answering model, e.g.
            `Salesforce/blip-vqa-base`.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): where it runs.

    Raises:
        ValueError: if the checkpoint cannot be loaded, or its tokenizer does not know the words.
    """

    def __init__(self, checkpoint: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, BlipForQuestionAnswering

        role = "question answering model"
        self.model: Any = load_model(BlipForQuestionAnswering, checkpoint, role).to(device)
        self.tokenizer = load_part(AutoTokenizer, checkpoint, role)
        self.processor = load_part(AutoImageProcessor, checkpoint, role)
        self.answers = [self._token(word) for word in ("yes", "no")]

    @torch.no_grad()
    def yes(self, image: Image.Image, phrases: Sequence[str]) -> list[float]:
        """Probability in [0, 1] of "yes" for each phrase."""
        device = self.model.device
        pixels = self.processor(images=[image], return_tensors="pt")["pixel_values"].to(device)
        questions = self.tokenizer([f"{phrase}?" for phrase in phrases], padding=True, return_tensors="pt").to(device)
        start = torch.full((len(phrases), 1), self.model.decoder_start_token_id, device=device)
        seen = self.model.vision_model(pixel_values=pixels).last_hidden_state.expand(len(phrases), -1, -1)
        question = self.model.text_encoder(
            input_ids=questions["input_ids"],
            attention_mask=questions["attention_mask"],
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:-1], dtype=torch.long, device=device),
        ).last_hidden_state
        answer = self.model.text_decoder(
            input_ids=start, encoder_hidden_states=question, encoder_attention_mask=questions["attention_mask"]
        )
        logits = answer.logits[:, 0, self.answers].float()  # [phrases, 2]
        return torch.softmax(logits, dim=-1)[:, 0].tolist()

    def _token(self, word: str) -> int:
        (token,) = self.tokenizer(word, add_special_tokens=False)["input_ids"][:1] or (None,)
        if token is None or token == self.tokenizer.unk_token_id:
            raise ValueError(f"The tokenizer of the question answering model does not know {word!r}.")
        return token
