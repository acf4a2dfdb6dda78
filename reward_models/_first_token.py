"""What a vision-language model would say first: pictures, a question, perhaps the answer's beginning, and P(word) at the next token.

In process, on transformers' own classes of the Qwen-VL family, with a gradient to the pixels. Pictures stand before the question in the
checkpoint's chat template, so that what they make of the context is computed once a picture and each question goes on from it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from reward_models import _bits, _clip
from reward_models._patches import Patches

FAMILIES = (
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "qwen3_5_moe",
)  # `model_type` of their configs
AT_ONCE = 8  # pictures, and questions, in one forward
MARK = "What is asked stands here."  # where the template has the question


@dataclass(frozen=True)
class Question:
    """picture: which row of the pixels it is about; text: the question; answers: spellings of each answer whose probability is wanted;
    begun: how the answer begins, given to the model."""

    picture: int
    text: str
    answers: tuple[tuple[str, ...], ...]
    begun: str = ""


def said(word: str) -> tuple[str, ...]:
    """Spellings of a word at an answer's beginning."""
    return tuple(f"{space}{form}" for space in ("", " ") for form in (word.capitalize(), word.lower()))


def log_mass(logits: Tensor, ids: Sequence[int]) -> Tensor:
    """log of the probability (R,) that the next token is one of `ids`, of logits (R, V): softmax over all tokens, each id counted once."""
    picked = torch.tensor(sorted(set(ids)), device=logits.device)
    wide = _clip.wide(logits)
    return wide[:, picked].logsumexp(-1) - wide.logsumexp(-1)


def positions(net: Any, ids: Tensor, grid: Tensor, types: Tensor | None) -> Tensor:
    """Positions (3, R, L) of tokens (R, L), pictures' in rows and columns. types (R, L): 1 where a picture's token stands, else 0.

    Raises:
        ValueError: without types, or with others than the pictures' grids ask for: some models then take plain positions silently.
    """
    merged = net.config.vision_config.spatial_merge_size**2
    expected = int(grid.prod(-1).sum()) // merged
    if types is None or types.shape != ids.shape or int(types.sum()) != expected:
        given = "none" if types is None else f"{int(types.sum())} of pictures in {tuple(types.shape)}"
        raise ValueError(f"token types: got {given}, expected {expected} of pictures in {tuple(ids.shape)}")
    return net.model.get_rope_index(ids, mm_token_type_ids=types, image_grid_thw=grid)[0]


def picked(cache: Any, rows: Tensor) -> Any:
    """A cache of some rows, with repeats if asked for; the given one stays as it is."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in chosen.layers:
        for key, value in vars(layer).items():
            if isinstance(value, dict):  # states of linear attention by number, which would be replaced in both
                setattr(layer, key, dict(value))
    chosen.reorder_cache(rows)
    return chosen


class FirstToken:
    """A causal vision-language model, frozen, in its file's precision, on the device of what it is shown."""

    _loaded: ClassVar[WeakValueDictionary[str, FirstToken]] = WeakValueDictionary()

    def __init__(self, source: str, quantize: str = "none") -> None:
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

        kind = AutoConfig.from_pretrained(source).model_type
        if kind not in FAMILIES:
            raise ValueError(f"{source} is a {kind}; allowed are {', '.join(FAMILIES)}")
        self.source = source
        net = AutoModelForImageTextToText.from_pretrained(source, dtype="auto").requires_grad_(False).eval()
        self.net: Any = _bits.quantised(net, quantize, ("lm_head",))
        self.tokenizer: Any = AutoTokenizer.from_pretrained(source)
        self.patches = Patches.read(source)
        self.image: int = self.net.config.image_token_id
        # transformers renames this argument; the old name goes with 5.40
        known = inspect.signature(self.net.model.forward).parameters
        self._cache = "cache" if "cache" in known else "past_key_values"
        self._checkpointed = False
        self._arounds: dict[int, tuple[list[int], str]] = {}

    @classmethod
    def load(cls, name: str, repo: str, place: str | None, quantize: str = "none") -> FirstToken:
        """The model of a reward. In half precision one serves all rewards that ask for the same place; one in float32 is the reward's own,
        since judges of training may be narrowed and those of evaluations not.

        Raises:
            FileNotFoundError: if there is none at the place.
        """
        source = _clip.fetched(name, place, repo)
        if (known := f"{source}+{quantize}") in cls._loaded:
            return cls._loaded[known]
        lacking = f"{source} holds no vision-language model as the hub lays it out"
        if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
            raise FileNotFoundError(lacking)
        try:
            made = cls(source, quantize)
        except OSError as error:
            raise FileNotFoundError(lacking if Path(source).is_dir() else _clip.missing(name, source)) from error
        if made.net.dtype in (torch.bfloat16, torch.float16) or quantize != "none":
            cls._loaded[known] = made
        return made

    def checkpoint(self) -> None:
        """Keep only the inputs of layers for the gradient. (transformers' own switch does nothing in evaluation.)"""
        if not self._checkpointed:
            _clip.checkpointed([*self.net.model.visual.blocks, *self.net.model.language_model.layers])
            self._checkpointed = True

    # -- words

    def first(self, spellings: Sequence[str]) -> list[int]:
        """Distinct ids of the first tokens of spellings."""
        return sorted({self.tokenizer(form, add_special_tokens=False).input_ids[0] for form in spellings})

    def apart(self, *answers: Sequence[str]) -> None:
        """Make sure that no two answers begin with the same token.

        Raises:
            ValueError: if two do.
        """
        ids = [set(self.first(spellings)) for spellings in answers]
        for k, own in enumerate(ids):
            for other in range(k):
                if own & ids[other]:
                    raise ValueError(f"{self.source}: {answers[other][0]!r} and {answers[k][0]!r} begin with one token")

    def _around(self, frames: int) -> tuple[list[int], str]:
        """What the template has before the question, as ids with one for each picture, and after it, as text."""
        if frames not in self._arounds:
            self._arounds[frames] = self._template(frames)
        return self._arounds[frames]

    def _template(self, frames: int) -> tuple[list[int], str]:
        shown = [*({"type": "image"} for _ in range(frames)), {"type": "text", "text": MARK}]
        text: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": shown}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        before, mark, after = text.partition(MARK)
        ids = self._ids(before)
        if not mark or ids.count(self.image) != frames:
            raise ValueError(f"{self.source}: its chat template does not show {frames} pictures and then a question")
        if self._ids(text) != [*ids, *self._ids(MARK), *self._ids(after)]:
            raise ValueError(f"{self.source}: its chat template joins the question to what stands beside it")
        return ids, after

    def _ids(self, text: str, safe: bool = False) -> list[int]:
        """Token ids; safe: what looks like a special token is spelt out, as in texts of users."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=safe).input_ids

    # -- asking

    def ask(self, pixels: Tensor, questions: Sequence[Question]) -> Tensor:
        """log P (R, K) of each question's K answers, as many for all, in float32 at least.

        Args:
            pixels: (N, F, 3, H, W) in [0, 1]; the F frames of a row are shown as pictures.
            questions: any number a row, in any order.
        """
        frames, (height, width) = pixels.shape[1], pixels.shape[-2:]
        self.net.to(pixels.device)
        begin, after = self._around(frames)
        repeats = self.patches.tokens(height, width)
        opening = [token for token in begin for _ in range(repeats if token == self.image else 1)]
        rest = [[*self._ids(q.text.strip(), safe=True), *self._ids(after + q.begun)] for q in questions]
        patches, grid = self.patches(pixels.flatten(0, 1))
        shown = patches.reshape(len(pixels), -1, patches.shape[-1]), torch.tensor([[1, *grid]] * frames)
        whole = torch.is_grad_enabled() and pixels.requires_grad
        states = (
            self._together(shown, opening, rest, questions) if whole else self._shared(shown, opening, rest, questions)
        )
        found = []
        for start in range(0, len(questions), AT_ONCE):
            logits = self.net.lm_head(torch.stack(states[start : start + AT_ONCE]))
            for row, question in zip(logits.split(1), questions[start : start + AT_ONCE], strict=True):
                found.append(torch.cat([log_mass(row, self.first(answer)) for answer in question.answers]))
        return torch.stack(found)

    def _together(
        self, shown: tuple[Tensor, Tensor], opening: list[int], rest: list[list[int]], questions: Sequence[Question]
    ) -> list[Tensor]:
        """Last states (D,), each question with its pictures in one forward: layers that are run again for the gradient cannot share a
        cache."""
        states: list[Tensor] = []
        for start in range(0, len(questions), AT_ONCE):
            pictures = [question.picture for question in questions[start : start + AT_ONCE]]
            rows = [[*opening, *ids] for ids in rest[start : start + AT_ONCE]]
            states += self._states(rows, *self._pictures(shown, pictures))
        return states

    def _shared(
        self, shown: tuple[Tensor, Tensor], opening: list[int], rest: list[list[int]], questions: Sequence[Question]
    ) -> list[Tensor]:
        """The same with each picture's beginning computed once, and a copy of its cache for each question."""
        states: dict[int, Tensor] = {}
        asked = sorted({question.picture for question in questions})
        for start in range(0, len(asked), AT_ONCE):
            place = {picture: row for row, picture in enumerate(asked[start : start + AT_ONCE])}
            patches, grid = self._pictures(shown, list(place))
            ids, where = self._placed([opening] * len(place), grid, patches.device)
            cache = self._forward(ids, where, patches, grid, use_cache=True)[self._cache]
            own = [k for k, question in enumerate(questions) if question.picture in place]
            own.sort(key=lambda k: len(rest[k]))  # rows of a forward are as long as its longest
            for first in range(0, len(own), AT_ONCE):
                rows = own[first : first + AT_ONCE]
                chosen = torch.tensor([place[questions[k].picture] for k in rows], device=patches.device)
                found = self._onward([rest[k] for k in rows], int(where.max()) + 1, picked(cache, chosen))
                states |= dict(zip(rows, found, strict=True))
        return [states[k] for k in range(len(questions))]

    def _pictures(self, shown: tuple[Tensor, Tensor], rows: list[int]) -> tuple[Tensor, Tensor]:
        """Patches (P, D) and grids (frames of all rows, 3) of some rows."""
        patches, grid = shown
        return patches[rows].flatten(0, 1), grid.repeat(len(rows), 1).to(patches.device)

    def _placed(self, rows: list[list[int]], grid: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Ids (R, L), shorter rows filled up at their end, which no earlier token sees, and positions (3, R, L)."""
        ids = _filled(rows, device)
        return ids, positions(self.net, ids, grid, (ids == self.image).int())

    def _states(self, rows: list[list[int]], patches: Tensor, grid: Tensor) -> list[Tensor]:
        ids, where = self._placed(rows, grid, patches.device)
        return _last(self._forward(ids, where, patches, grid, use_cache=False).last_hidden_state, rows)

    def _onward(self, rows: list[list[int]], start: int, cache: Any) -> list[Tensor]:
        ids = _filled(rows, self.net.device)
        where = (start + torch.arange(ids.shape[1], device=ids.device)).expand(3, *ids.shape)
        out = self.net.model(input_ids=ids, position_ids=where, use_cache=True, **{self._cache: cache})
        return _last(out.last_hidden_state, rows)

    def _forward(self, ids: Tensor, where: Tensor, patches: Tensor, grid: Tensor, use_cache: bool) -> Any:
        return self.net.model(
            input_ids=ids, position_ids=where, pixel_values=patches, image_grid_thw=grid, use_cache=use_cache
        )


def _filled(rows: list[list[int]], device: torch.device) -> Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)


def _last(states: Tensor, rows: list[list[int]]) -> list[Tensor]:
    return [states[k, len(row) - 1] for k, row in enumerate(rows)]
