"""What several sections of a config share: types of values, and marks of keys."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from diffalign.runtime.precision import PRECISIONS, SHORT

Decay = Annotated[float, Field(ge=0, lt=1)]
Precision = Annotated[
    Literal["float32", "bfloat16"],
    BeforeValidator(lambda given: SHORT.get(given, given) if isinstance(given, str) else given),
]
assert Precision.__origin__.__args__ == tuple(PRECISIONS)  # type: ignore[attr-defined]


# Whether a key may change when a run is taken up again. Held: never; free: as the user likes; on request: with --change.
# A section's mark is that of its keys, unless they have their own.
HELD: dict[str, Any] = {"resume": "held"}
FREE: dict[str, Any] = {"resume": "free"}
ASKED: dict[str, Any] = {"resume": "on request"}
