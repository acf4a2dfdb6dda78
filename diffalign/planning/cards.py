"""Graphics cards by the names people use: their memory, and how fast they multiply matrices."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from diffalign.errors import UserError


@dataclass(frozen=True)
class Card:
    """memory: GiB; rate: dense bfloat16 products with float32 sums, FLOP/s, by the vendor's data sheet; large products reach some 60 to
    80 % of it. None: not known here."""

    name: str
    memory: float
    rate: float | None = None


def _table() -> dict[str, Card]:
    tera = 1e12
    cards = (
        Card("RTX 3060", 12),
        Card("RTX 3080", 10),
        Card("RTX 3090", 24, 71 * tera),
        Card("RTX 3090 Ti", 24, 80 * tera),
        Card("RTX 4060", 8),
        Card("RTX 4060 Ti", 8),
        Card("RTX 4060 Ti 16GB", 16),
        Card("RTX 4070", 12),
        Card("RTX 4070 Ti", 12),
        Card("RTX 4070 Ti Super", 16),
        Card("RTX 4080", 16, 97.5 * tera),
        Card("RTX 4080 Super", 16),
        Card("RTX 4090", 24, 165 * tera),
        Card("RTX 5060 Ti 16GB", 16),
        Card("RTX 5070", 12),
        Card("RTX 5070 Ti", 16),
        Card("RTX 5080", 16),
        Card("RTX 5090", 32, 209 * tera),
        Card("A10", 24, 125 * tera),
        Card("A100 40GB", 40, 312 * tera),
        Card("A100", 80, 312 * tera),
        Card("A6000", 48, 155 * tera),
        Card("RTX 6000 Ada", 48, 364 * tera),
        Card("L4", 24, 121 * tera),
        Card("L40S", 48, 362 * tera),
        Card("H100", 80, 989 * tera),
        Card("H100 PCIe", 80, 756 * tera),
        Card("H200", 141, 989 * tera),
        Card("B200", 180, 2250 * tera),
    )
    return {_plain(card.name): card for card in cards}


def _plain(name: str) -> str:
    """A name without what people leave out: maker, series, spaces."""
    return re.sub(r"nvidia|geforce|rtx|80gb|sxm\d?|[^a-z0-9]", "", name.lower())


CARDS = _table()


def find(name: str) -> Card:
    """The card of a name such as `RTX 4090`, `4090`, `rtx4090`, `a100-80gb`.

    Raises:
        UserError: for one that is not in the table.
    """
    plain = _plain(name)
    for tried in (plain, _plain(re.sub(r"[\s_-]+\d+\s*gb$", "", name.lower()))):
        if (card := CARDS.get(tried)) is not None:
            return card
    near = difflib.get_close_matches(plain, CARDS, 1, 0.75)
    hint = f"did you mean {CARDS[near[0]].name}" if near else f"known are {', '.join(c.name for c in CARDS.values())}"
    raise UserError(f"--card: got {name!r}; {hint}; for any other: --vram with its memory")
