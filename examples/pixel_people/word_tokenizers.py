# SPDX-License-Identifier: Apache-2.0
"""CLIP, T5 and Gemma tokenizers of a small vocabulary: one token per word, of the classes that pipelines expect."""

from __future__ import annotations

import itertools
import string
from collections import Counter
from collections.abc import Sequence

from transformers import CLIPTokenizer, GemmaTokenizer, T5Tokenizer


def learn_merges(words: Sequence[str], ending: str = "") -> list[tuple[str, str]]:
    """Byte-pair merges (Sennrich et al., arXiv:1508.07909) that make one token of every word.

    Args:
        words: The words; repeated ones count once.
        ending: What marks the last letter of a word in the vocabulary.

    ``tokenizers.trainers.BpeTrainer`` breaks ties at random, and a resumed training would meet other token ids.
    """
    spelled = [[*word[:-1], word[-1] + ending] for word in sorted(set(words))]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for symbols in spelled for pair in itertools.pairwise(symbols)):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for symbols in spelled:
            for k in range(len(symbols) - 2, -1, -1):
                if tuple(symbols[k : k + 2]) == best:
                    symbols[k : k + 2] = ["".join(best)]
    return merges


def build_clip_tokenizer(words: Sequence[str], length: int) -> CLIPTokenizer:
    """A CLIP tokenizer with one token per word of the grammar; anything else is spelled by smaller pieces."""
    letters = string.ascii_lowercase + string.digits + string.punctuation
    merges = learn_merges(words, ending="</w>")
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    pieces += [first + second for first, second in merges]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)


def build_t5_tokenizer(words: Sequence[str], length: int) -> T5Tokenizer:
    """A T5 tokenizer with one piece per word of the grammar; anything else is spelled letter by letter."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (",", -2.0), ("▁", -4.0)]
    pieces += [(f"▁{word}", -3.0) for word in words]
    pieces += [(letter, -10.0) for letter in string.ascii_lowercase + string.digits + ".-'"]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length)


def build_gemma_tokenizer(words: Sequence[str], length: int) -> GemmaTokenizer:
    """A Gemma tokenizer with one token per word, first or not; anything else is spelled by smaller pieces."""
    merges = learn_merges(words) + [("▁", word) for word in sorted(set(words))]
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *string.ascii_lowercase, *string.digits]
    pieces += string.punctuation
    pieces += [first + second for first, second in merges]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return GemmaTokenizer(vocab=vocab, merges=merges, add_bos_token=True, model_max_length=length)
