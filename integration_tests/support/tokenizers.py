# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of the stock classes with a letter for a token: no file, no network."""

import string

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer, GemmaTokenizer, LlamaTokenizer, Qwen2Tokenizer, T5Tokenizer


CLIP_VOCAB_SIZE = 514
_LETTERS = [letter for letter in string.printable[:95] if letter != " "]
_CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def clip_tokenizer() -> CLIPTokenizer:
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5Tokenizer(vocab=special + [(letter, -3.0) for letter in _LETTERS], extra_ids=0)


def qwen_tokenizer() -> Qwen2Tokenizer:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"]
    vocab = {token: index for index, token in enumerate([*sorted(ByteLevel.alphabet()), *special])}
    return Qwen2Tokenizer(vocab=vocab, merges=[], chat_template=_CHAT)


def gemma_tokenizer() -> GemmaTokenizer:
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", *_LETTERS]
    return GemmaTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[])


def llama_tokenizer() -> LlamaTokenizer:
    tokens = ["<unk>", "<s>", "</s>", "▁", *_LETTERS]
    vocab = {token: index for index, token in enumerate(tokens)}
    return LlamaTokenizer(vocab=vocab, merges=[], pad_token="</s>", padding_side="right")
