"""What a judge on Qwen2-VL is asked, as tokens: its chat, its template, the prompt in it, special tokens at which the answer is read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from reward_models import _clip

MARK = "{text_prompt}"  # where the prompt stands in templates
PADS = {"image": "<|image_pad|>", "video": "<|video_pad|>"}


class Words:
    """A tokenizer with a judge's special tokens at its end, and the judge's question.

    Args:
        source: folder or hub id of the base model, whose tokenizer and chat it is.
        template: the question with the mark and the special tokens, each once and in order.
        special: the tokens; their ids are `special_ids`.
        shown: "image" or "video", which stands before the question.

    Raises:
        ValueError: if a special token is not one token at the vocabulary's end, or the template lacks something.
    """

    def __init__(self, name: str, source: str, template: str, special: tuple[str, ...], shown: str) -> None:
        from transformers import AddedToken, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(source)
        first = len(self.tokenizer)
        self.tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special], True)
        self.special_ids = [self._whole(token) for token in special]
        if self.special_ids != list(range(first, first + len(special))):
            found = ", ".join(map(str, self.special_ids))
            raise ValueError(f"{' '.join(special)}: ids {found}, expected at the end of a vocabulary of {first}")
        self.rows: int = len(self.tokenizer)
        self.pad_id = self._whole(PADS[shown])
        asked = [{"role": "user", "content": [{"type": shown}, {"type": "text", "text": template}]}]
        chat = _chat(name, source, self.tokenizer)
        text = self.tokenizer.apply_chat_template(asked, chat_template=chat, tokenize=False, add_generation_prompt=True)
        for piece in (MARK, PADS[shown], *special):
            if text.count(piece) != 1:
                raise ValueError(f"the template has {piece} {text.count(piece)} times in its chat, allowed is once")
        last = max(text.index(token) + len(token) for token in special)
        self._pieces = self._cut(text[:last])  # what comes after is read by nothing

    def __call__(self, prompt: str, count: int) -> list[int]:
        """Token ids of the question about a prompt, `count` of them for what is shown; the last is the last special token.

        Special tokens in a prompt are letters like others.
        """
        ids: list[int] = []
        for piece in self._pieces:
            if isinstance(piece, str):
                ids += self._letters(piece.replace(MARK, prompt, 1))
            else:
                ids += [piece] * (count if piece == self.pad_id else 1)
        return ids

    def _whole(self, token: str) -> int:
        """A token's id.

        Raises:
            ValueError: if it is none, or several.
        """
        ids = self.tokenizer(token, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise ValueError(f"the tokenizer splits {token} into {len(ids)} tokens, allowed is one")
        return int(ids[0])

    def _letters(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)

    def _cut(self, text: str) -> list[str | int]:
        """A text as pieces between special tokens, and these as ids. Tokenizers split at them first, so that pieces are tokenised alone."""
        special = {token for token in self.tokenizer.get_added_vocab() if token in text}
        pattern = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
        parts = re.split(f"({pattern})", text)
        return [self._whole(part) if part in special else part for part in parts if part]


def _chat(name: str, source: str, tokenizer: Any) -> str:
    """The base's chat template: beside its tokenizer's settings, or in a file of its own."""
    if isinstance(tokenizer.chat_template, str):
        return tokenizer.chat_template
    return str(settings(name, source, "chat_template.json")["chat_template"])


def settings(name: str, source: str, file: str) -> dict[str, Any]:
    """A JSON file of a folder, or of a repository on the hub.

    Raises:
        FileNotFoundError: if it is not there.
    """
    local = str(Path(source) / file) if Path(source).is_dir() else None
    return dict(json.loads(Path(_clip.fetched(name, local, source, file)).read_text(encoding="utf-8")))
