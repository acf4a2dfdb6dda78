"""Tokenizers and text encoders of the shapes world: a word is a token, and the encoders are a few layers wide.

The T5 slot that Stable Diffusion 3 insists on holds an encoder that returns exact zeros for every text, which is what the
pipeline itself uses where T5 is left out. Its tokenizer drops the text, so any `max_sequence_length` works.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import TypeVar

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from diffalign.shapes import captions, motion
from diffalign.shapes.world import COLOURS, SHAPES

Encoder = TypeVar("Encoder", CLIPTextModel, CLIPTextModelWithProjection)
LENGTH = 16  # tokens of a caption, start and end included; the longest has 13


def words() -> list[str]:
    """Every word a caption can contain."""
    plural = [shape + "s" for shape in SHAPES]
    relations = " ".join(captions.RELATIONS).split()
    return sorted(
        {"a", "an", "photo", "of", "and", *relations, *captions.NUMERALS.values(), *COLOURS, *SHAPES, *plural}
    )


def motion_words() -> list[str]:
    """Every word a caption of a video can contain."""
    return sorted({"a", "an", *" ".join(motion.MOTIONS).split(), *COLOURS, *SHAPES})


def tokenizer(known: list[str] | None = None) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges make every known word one token; other text falls back to letters."""
    merges = byte_pairs(known or words())
    letters = [chr(code) for code in range(33, 127)]
    pieces = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"]))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH)


def byte_pairs(corpus: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges (Sennrich 2016) until every word is one piece; ties go to the first pair in sorted order.

    The tokenizers library breaks ties at random, so its ids differ from run to run.
    """
    split = [[*word[:-1], word[-1] + "</w>"] for word in corpus]
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for pieces in split for pair in itertools.pairwise(pieces)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        split = [_merge(pieces, best) for pieces in split]
    return merges


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def clip_encoder(
    tokens: CLIPTokenizer, width: int, layers: int, kind: type[Encoder] = CLIPTextModelWithProjection
) -> Encoder:  # type: ignore[assignment]
    """A small CLIP text tower. Token embeddings start at N(0, 1): Stable Diffusion 3 reads raw hidden states."""
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 16,
        max_position_embeddings=LENGTH,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
        hidden_act="gelu",
    )
    model = kind(config)
    embeddings = getattr(model, "text_model", model).embeddings  # one of the two wraps its tower, the other is it
    torch.nn.init.normal_(embeddings.token_embedding.weight, std=1.0)
    torch.nn.init.normal_(embeddings.position_embedding.weight, std=0.3)
    return model


def silent_t5(width: int) -> tuple[PreTrainedTokenizerFast, T5EncoderModel]:
    """A T5 tokenizer that drops all text and an encoder that returns exact zeros of the given width."""
    raw = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    raw.normalizer = normalizers.Replace(Regex(r"[\s\S]+"), "")
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=256
    )
    config = T5Config(vocab_size=3, d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    model = T5EncoderModel(config)
    torch.nn.init.zeros_(model.encoder.final_layer_norm.weight)
    return fast, model
