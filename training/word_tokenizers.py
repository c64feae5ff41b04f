"""Word-level tokenizers in the classes that the stock pipelines use, built without any file.

The vocabulary is the caption grammar's words plus single characters, so every caption word is one
token and an unknown word is spelled. Nothing depends on hash order: two builds give the same ids.
"""

from __future__ import annotations

import itertools
import string
from collections import Counter

import torch
from transformers import CLIPTokenizer, LlamaTokenizerFast, T5TokenizerFast

CHARACTERS = string.ascii_lowercase + string.digits + ",.!?'-"


def byte_pair_merges(splits: list[list[str]]) -> list[tuple[str, str]]:
    """Merges that join each word of ``splits`` to one token; ties go to the smallest pair."""
    merges, splits = [], [list(parts) for parts in splits]
    while True:
        pairs = Counter(pair for parts in splits for pair in itertools.pairwise(parts))
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for parts in splits:
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = ["".join(best)]
                i += 1


def _vocabulary(tokens: list[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


def both_cases(words: list[str]) -> list[str]:
    """Each word, and the word with a capital: only CLIP's tokenizer folds case by itself."""
    return [*words, *(word.capitalize() for word in words)]


def copy_capitals(tokenizer, embedding: torch.Tensor, words: list[str]) -> None:
    """Let capitalised words mean what the others mean: ``embedding`` is [vocabulary, D]."""
    lower, upper = (
        tokenizer.convert_tokens_to_ids(["\u2581" + w for w in group])
        for group in (words, [word.capitalize() for word in words])
    )
    with torch.no_grad():
        embedding[upper] = embedding[lower]


def clip_tokenizer(words: list[str], max_length: int) -> CLIPTokenizer:
    """CLIP's convention: the last symbol of a word carries ``</w>``."""
    merges = byte_pair_merges([[*word[:-1], word[-1] + "</w>"] for word in words])
    tokens = [*CHARACTERS, *(c + "</w>" for c in CHARACTERS), *("".join(m) for m in merges)]
    vocab = _vocabulary([*tokens, "<|startoftext|>", "<|endoftext|>"])
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def t5_tokenizer(words: list[str], max_length: int) -> T5TokenizerFast:
    """A unigram model: one piece per word, dearer pieces for single characters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    pieces += [("\u2581" + word, -1.0) for word in both_cases(words)]
    pieces += [("\u2581", -8.0)] + [(c, -8.0) for c in CHARACTERS]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=max_length)


def llama_tokenizer(words: list[str], max_length: int) -> LlamaTokenizerFast:
    """Llama's convention: a word begins with the metaspace. Pads on the right, as the real one."""
    merges = byte_pair_merges([["\u2581", *word] for word in both_cases(words)])
    tokens = ["<unk>", "<s>", "</s>", "<pad>", "\u2581", *CHARACTERS, *CHARACTERS.upper()]
    tokens += ["".join(pair) for pair in merges]
    # padding_side must go in here: set afterwards it would not be saved.
    return LlamaTokenizerFast(
        vocab=_vocabulary(tokens),
        merges=merges,
        pad_token="<pad>",
        padding_side="right",
        model_max_length=max_length,
    )
