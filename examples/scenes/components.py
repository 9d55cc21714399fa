# SPDX-License-Identifier: Apache-2.0
"""The untrained teachers of Scenes: stock diffusers pipelines, a small transformer and small text encoders in each."""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import (
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
)
from diffusers.models.embeddings import apply_rotary_emb
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
)

from diffusers_ternary.evaluation.geneval import RELATIONS, TASKS, Task
from diffusers_ternary.evaluation.scenes.prompts import COMPOSED, MAX_OBJECTS, training_task
from diffusers_ternary.evaluation.scenes.vocabulary import CLASSES, COLORS, MAX_COUNT, NUMBERS, PLURALS


sys.path.append(str(Path(__file__).parents[1] / "pixel_people"))
from word_tokenizers import build_clip_tokenizer, build_gemma_tokenizer, build_t5_tokenizer


TEXT_LENGTH = 18  # tokens; the longest prompt has 15
TEXT_WIDTH = 128
POOLED_WIDTH = 64
LATENT_CHANNELS = 4
LATENT_SIDE = 16
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def vocabulary() -> list[str]:
    """Every word that a caption can have, in alphabetical order."""
    rng = random.Random(0)
    captions = (training_task(tag, rng).prompt for tag in (*TASKS, COMPOSED) for _ in range(200))
    words = set(itertools.chain.from_iterable(text.split() for text in captions))
    return sorted(words | {*CLASSES, *PLURALS.values(), *COLORS, *NUMBERS[1:]})


def initialize(transformer: nn.Module, zero: tuple[str, ...]) -> None:
    """Xavier for every linear layer, zero for those whose name contains one of ``zero`` (DiT, arXiv:2212.09748)."""
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if any(part in name for part in zero):
                nn.init.zeros_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def favor_neighbors(encoder: T5EncoderModel) -> None:
    """Start the heads of a T5 encoder at the word before, the word after, and the two before that.

    T5's only notion of order is a bias per head and distance. Those biases begin near zero, a step of Adam moves them
    by the learning rate, and it takes several units to single out one word: for thousands of steps the encoder reads a
    bag of words, and "a red bell and a blue bus" is drawn as two mixtures.
    """
    (bias,) = (p for name, p in encoder.named_parameters() if name.endswith("relative_attention_bias.weight"))
    after = encoder.config.relative_attention_num_buckets // 2  # buckets of words behind; a bucket a word at first
    with torch.no_grad():
        for head, distances in enumerate(((-1,), (1,), (-2, -3))):
            for distance in distances:
                bias[after + distance if distance > 0 else -distance, head] += 4.0


def build_flux(vae: AutoencoderTiny, *, width: int, num_layers: int, num_single_layers: int) -> FluxPipeline:
    """A FluxPipeline with heads of 64 around a trained autoencoder.

    Args:
        vae: The autoencoder of ``train_vae.py``.
        width: Inner width of the transformer, a multiple of 64.
        num_layers: Number of double-stream blocks.
        num_single_layers: Number of single-stream blocks.
    """
    words = vocabulary()
    clip_tokenizer, t5_tokenizer = build_clip_tokenizer(words, TEXT_LENGTH), build_t5_tokenizer(words, TEXT_LENGTH)
    transformer = FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=num_layers,
        num_single_layers=num_single_layers,
        attention_head_dim=64,
        num_attention_heads=width // 64,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        axes_dims_rope=(16, 24, 24),
        guidance_embeds=False,
    )
    initialize(transformer, zero=(".norm1", ".norm1_context", ".norm.", "norm_out.linear", "proj_out_"))
    nn.init.zeros_(transformer.proj_out.weight)
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=POOLED_WIDTH,
            projection_dim=POOLED_WIDTH,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=clip_tokenizer.eos_token_id,
            pad_token_id=clip_tokenizer.pad_token_id,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer),
            d_model=TEXT_WIDTH,
            d_kv=32,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=TEXT_LENGTH,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
        )
    )
    favor_neighbors(t5)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=transformer,
    )


class ContentHead(nn.Module):
    """Reads from a block in the first half of a transformer what each image token shows; for training alone.

    Diffusion transformers learn several times faster when an early block is made to know what is in the picture
    (REPA, arXiv:2410.06940). There the knowledge comes from an image encoder; here from the exact labels.

    Args:
        block: The block to read, which returns its image tokens [B, tokens, ``width``], alone or last in a tuple.
        width: Channels of an image token.
    """

    def __init__(self, block: nn.Module, width: int) -> None:
        super().__init__()
        self.classes = nn.Linear(width, len(CLASSES) + 1)
        self.colors = nn.Linear(width, len(COLORS) + 1)
        self.tokens: list[torch.Tensor] = []  # of the forward pass that is under way
        block.register_forward_hook(self.keep)

    def keep(self, _block: nn.Module, _arguments: tuple, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        """Forward hook: hold the image tokens until ``forward`` reads them."""
        if self.training:
            self.tokens.append(output if isinstance(output, torch.Tensor) else output[-1])

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of class [B, tokens, classes + 1] and color [B, tokens, colors + 1]; background is the last."""
        tokens = self.tokens.pop()
        return self.classes(tokens), self.colors(tokens)


class LanguageHead(nn.Module):
    """Reads from a text encoder, at every noun, what the caption says of it; for training alone.

    Large models get a text encoder that knows grammar before they draw. This one starts from nothing, and without a
    word of its own about "the bell is the red one" a transformer long draws two mixtures of both objects.

    Args:
        encoder: Returns its tokens [B, tokens, ``width``] first.
        width: Channels of a text token.
    """

    SIZES = (len(COLORS) + 1, len(RELATIONS) + 1, MAX_COUNT + 1)  # the last color and relation: none is named

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.fields = nn.Linear(width, sum(self.SIZES))
        self.tokens: list[torch.Tensor] = []  # of the forward pass that is under way
        encoder.register_forward_hook(self.keep)

    def keep(self, _encoder: nn.Module, _arguments: tuple, output: Sequence[torch.Tensor]) -> None:
        """Forward hook: hold the text tokens until ``forward`` reads them."""
        if self.training:
            self.tokens.append(output[0])

    def forward(self) -> tuple[torch.Tensor, ...]:
        """Logits of the color, the relation to the other noun and the number, each [B, tokens, ...]."""
        return self.fields(self.tokens.pop()).split(self.SIZES, -1)


class Grounding(nn.Module):
    """Watches one attention head of a block: which word does each image token look up? For training alone.

    A token that knows its color and where it lies has to find the noun with that color and relation among the text's
    keys. Told which noun it is, a head learns so directly, instead of from pictures that turn out as a mixture.

    Args:
        queries: Makes those of image tokens, [B, tokens, heads, ``width``] or [B, tokens, heads * ``width``].
        keys: Makes those of text tokens.
        width: Channels of a head.
    """

    def __init__(self, queries: nn.Module, keys: nn.Module, width: int) -> None:
        super().__init__()
        self.width = width
        self.seen: dict[str, torch.Tensor] = {}  # of the forward pass that is under way
        queries.register_forward_hook(lambda _module, _arguments, output: self.keep("queries", output))
        keys.register_forward_hook(lambda _module, _arguments, output: self.keep("keys", output))

    def keep(self, name: str, output: torch.Tensor) -> None:
        """Hold the first head's vectors until ``forward`` reads them."""
        if self.training:
            self.seen[name] = output.flatten(2)[..., : self.width]

    def forward(self, rotary: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        """Logits [B, image tokens, text tokens] of the head's attention.

        Args:
            rotary: Cosines and sines [image tokens, ``width``] by which the model turns its queries; text is not
                turned, its positions are zero.
        """
        queries, keys = self.seen.pop("queries"), self.seen.pop("keys")
        if rotary is not None:
            queries = apply_rotary_emb(queries[:, :, None], rotary, sequence_dim=1)[:, :, 0].to(keys.dtype)
        return queries @ keys.mT * self.width**-0.5


UNNAMED = -100  # the label of tokens that are no nouns; cross_entropy skips it


def noun_labels(
    ids: torch.Tensor, tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase
) -> tuple[torch.Tensor, torch.Tensor]:
    """What captions say of their nouns, for ``LanguageHead``, and which noun names which object, for ``Grounding``.

    Args:
        ids: Token ids [B, tokens] of the captions.
        tasks: What the captions ask for.
        tokenizer: Of one token per word.

    Returns:
        int64 [B, tokens, 3]: color, relation to the other noun, number; ``UNNAMED`` where no noun stands.
        int64 [B, ``MAX_OBJECTS``]: the token that names the object; ``UNNAMED`` where none does.
    """
    labels = torch.full((*ids.shape, len(LanguageHead.SIZES)), UNNAMED)
    names = torch.full((len(ids), MAX_OBJECTS), UNNAMED)
    for row, (tokens, task) in enumerate(zip(ids, tasks, strict=True)):
        relations = [(r.position[0] if r.position else None) for r in task.include]
        if len(relations) == 2 and relations[1]:
            relations[0] = INVERSE[relations[1]]
        first = 0  # object of the requirement
        for requirement, relation in zip(task.include, relations, strict=True):
            noun = requirement.name if requirement.count == 1 else PLURALS[requirement.name]
            token = tokenizer.convert_tokens_to_ids(f"▁{noun}")  # after an article or a number
            (places,) = (tokens == token).nonzero(as_tuple=True)
            if len(places):  # the caption was not left away
                names[row, first : first + requirement.count] = places[0]
            first += requirement.count
            labels[row, places] = torch.tensor(
                (
                    tuple(COLORS).index(requirement.color) if requirement.color else len(COLORS),
                    RELATIONS.index(relation) if relation else len(RELATIONS),
                    requirement.count,
                )
            )
    return labels, names


class FluxTrainee(nn.Module):
    """The trained parts of a FluxPipeline in one module: noisy latents and token ids in, velocity out."""

    def __init__(self, pipeline: FluxPipeline) -> None:
        super().__init__()
        self.content = ContentHead(pipeline.transformer.transformer_blocks[-1], pipeline.transformer.inner_dim)
        self.transformer = pipeline.transformer
        self.text_encoder = pipeline.text_encoder
        self.text_encoder_2 = pipeline.text_encoder_2
        self.language = LanguageHead(self.text_encoder_2, TEXT_WIDTH)
        attentions = [block.attn for block in self.transformer.transformer_blocks[-2:]]
        self.grounding = nn.ModuleList(
            Grounding(part.norm_q, part.norm_added_k, self.transformer.config.attention_head_dim)
            for part in attentions
        )
        self.tokenizers = (pipeline.tokenizer, pipeline.tokenizer_2)

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Predict the velocity, of the latents' shape, at ``timestep`` in [0, 1] the way FluxPipeline does."""
        side = latents.shape[-1]
        positions = FluxPipeline._prepare_latent_image_ids(1, side // 2, side // 2, latents.device, torch.float32)
        packed = FluxPipeline._pack_latents(latents, *latents.shape)
        velocity = self.transformer(
            hidden_states=packed,
            timestep=timestep,
            encoder_hidden_states=self.text_encoder_2(ids[:, 1])[0],
            pooled_projections=self.text_encoder(ids[:, 0]).pooler_output,
            txt_ids=positions.new_zeros(ids.shape[-1], 3),
            img_ids=positions,
            return_dict=False,
        )[0]
        self.rotary = self.transformer.pos_embed(positions)
        return FluxPipeline._unpack_latents(velocity, side, side, vae_scale_factor=1)

    def lookups(self) -> list[torch.Tensor]:
        """Attention logits [B, image tokens, text tokens] of the heads that look nouns up."""
        return [grounding(self.rotary) for grounding in self.grounding]


def build_sana(vae: AutoencoderTiny, *, width: int, num_layers: int) -> SanaPipeline:
    """A SanaPipeline with heads of 32 around a trained autoencoder.

    Args:
        vae: The autoencoder of ``train_vae.py``.
        width: Inner width of the transformer, a multiple of 64.
        num_layers: Number of blocks.
    """
    tokenizer = build_gemma_tokenizer(vocabulary(), TEXT_LENGTH)
    transformer = SanaTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=width // 32,
        attention_head_dim=32,
        num_layers=num_layers,
        num_cross_attention_heads=width // 64,
        cross_attention_head_dim=64,
        cross_attention_dim=width,
        caption_channels=TEXT_WIDTH,
        sample_size=LATENT_SIDE,
        patch_size=2,
        interpolation_scale=1,
    )
    initialize(transformer, zero=("attn2.to_out", "time_embed.linear"))
    nn.init.zeros_(transformer.proj_out.weight)
    with torch.no_grad():
        for block in transformer.transformer_blocks:
            block.scale_shift_table.zero_()  # with the zeroed time_embed.linear: blocks start as identity
    gemma = Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
            query_pre_attn_scalar=32,
            max_position_embeddings=TEXT_LENGTH,
            sliding_window=TEXT_LENGTH,
            initializer_range=TEXT_WIDTH**-0.5,
            use_cache=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=gemma,
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
    )


class SanaTrainee(nn.Module):
    """The trained parts of a SanaPipeline in one module: noisy latents and token ids in, velocity out."""

    def __init__(self, pipeline: SanaPipeline) -> None:
        super().__init__()
        blocks = pipeline.transformer.transformer_blocks
        self.content = ContentHead(blocks[len(blocks) // 3], pipeline.transformer.config.cross_attention_dim)
        self.transformer = pipeline.transformer
        self.text_encoder = pipeline.text_encoder
        self.language = LanguageHead(self.text_encoder, TEXT_WIDTH)
        attentions = [block.attn2 for block in blocks[: len(blocks) // 3 + 1][-2:]]
        self.grounding = nn.ModuleList(
            Grounding(part.to_q, part.to_k, self.transformer.config.cross_attention_head_dim) for part in attentions
        )
        self.tokenizers = (pipeline.tokenizer,)
        pipeline.tokenizer.padding_side = "right"  # as SanaPipeline sets it

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Predict the velocity, of the latents' shape, at ``timestep`` in [0, 1] the way SanaPipeline does."""
        mask = (ids[:, 0] != self.text_encoder.config.pad_token_id).long()
        return self.transformer(
            latents,
            encoder_hidden_states=self.text_encoder(ids[:, 0], attention_mask=mask)[0],
            encoder_attention_mask=mask,
            timestep=1000.0 * timestep,
            return_dict=False,
        )[0]

    def lookups(self) -> list[torch.Tensor]:
        """Attention logits [B, image tokens, text tokens] of the heads that look nouns up."""
        return [grounding() for grounding in self.grounding]


def token_ids(tokenizers: Sequence[PreTrainedTokenizerBase], captions: list[str]) -> torch.Tensor:
    """Token ids of the captions by each tokenizer, int64 [batch, tokenizers, ``TEXT_LENGTH``]."""
    settings = {"padding": "max_length", "max_length": TEXT_LENGTH, "truncation": True, "return_tensors": "pt"}
    return torch.stack([tokenizer(captions, **settings).input_ids for tokenizer in tokenizers], dim=1)
