"""Small tokenizers and text encoders for the vocabulary of the rendered world, of the types that FLUX and HunyuanDiT use.

Other words are split into letters, so tokenizers never fail.
"""

from __future__ import annotations

import re
from functools import cache
from random import Random
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from training.rendered.captions import styled_caption
from training.rendered.cast import CAST
from training.rendered.world import STYLES, some_scene

WORD_START = "\u2581"
CAPTIONS = 6000
"""Captions of the corpus. Enough for every word to occur many times."""
CLIP_MERGES = 1200


@cache
def corpus() -> tuple[str, ...]:
    random = Random(0)
    told = [styled_caption(some_scene(random, pairs=0.1), random.choice(STYLES), random) for _ in range(CAPTIONS)]
    return (*told, *(f"{name}, {name} in a red shirt" for name in CAST))


@cache
def words() -> tuple[str, ...]:
    """Return all words of the captions and the names of the cast, most frequent first."""
    counts: dict[str, int] = {}
    for text in corpus():
        for word in re.findall(r"[a-z]+", text):
            counts[word] = counts.get(word, 0) + 1
    return tuple(sorted(counts, key=lambda word: (-counts[word], word)))


def t5_tokenizer(max_length: int) -> Any:
    """Return a Unigram tokenizer: one piece per word (also capitalised), printable ASCII, special pieces with T5's ids."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (WORD_START, -2.0)]
    pieces += [(chr(code), -12.0) for code in range(33, 127)]
    pieces += [
        (WORD_START + form, -1.0) for word in words() for form in dict.fromkeys((word, word.capitalize())) if len(word) > 0
    ]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=max_length)


def clip_tokenizer() -> Any:
    """Return a byte-level BPE tokenizer with merges learned from the captions. Most of their words are one token."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Punctuation()])
    trainer = trainers.BpeTrainer(vocab_size=CLIP_MERGES, end_of_word_suffix="</w>", show_progress=False)
    learner.train_from_iterator(corpus(), trainer)
    merges = [tuple(pair) for pair in _merges(learner)]
    letters = sorted(ByteLevel.alphabet())
    joined = ["".join(pair) for pair in merges]
    # The end token has the highest id, as in the original CLIP, whose pooling may depend on it.
    pieces = list(
        dict.fromkeys([*letters, *(letter + "</w>" for letter in letters), *joined, "<|startoftext|>", "<|endoftext|>"])
    )
    return CLIPTokenizer(vocab={piece: n for n, piece in enumerate(pieces)}, merges=merges, model_max_length=77)


def _merges(learner: Tokenizer) -> list[list[str]]:
    import json

    found = json.loads(learner.to_str())["model"]["merges"]
    return [pair.split(" ") if isinstance(pair, str) else pair for pair in found]


def bert_tokenizer(max_length: int) -> Any:
    """Return a lower-case WordPiece tokenizer with one piece per word, and letters for all other words."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    for code in range(33, 127):
        letter = chr(code).lower()
        pieces += [piece for piece in (letter, "##" + letter) if piece not in pieces]
    pieces += [word for word in words() if word not in pieces]
    return BertTokenizer(vocab={piece: n for n, piece in enumerate(pieces)}, model_max_length=max_length)


def t5_encoder(tokenizer: Any, channels: int, layers: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=channels,
            d_kv=channels // 4,
            d_ff=2 * channels,
            num_layers=layers,
            num_heads=4,
            is_encoder_decoder=False,
            use_cache=False,
            dropout_rate=0.0,
        )
    )


def clip_encoder(tokenizer: Any, channels: int, layers: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=channels,
            intermediate_size=2 * channels,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def bert_encoder(tokenizer: Any, channels: int, layers: int) -> BertModel:
    return BertModel(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=channels,
            intermediate_size=2 * channels,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
