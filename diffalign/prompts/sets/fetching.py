"""Published prompts fetched once, by the user's own command, into the user's cache: the published file and no other, by its sha256."""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from diffalign.errors import UserError, one_line
from diffalign.prompts.sets.published import PUBLISHED
from diffalign.runtime.files import is_file
from diffalign.runtime.launcher import cache_folder

SECONDS, LARGEST = 60, 2**25  # for an answer; bytes


def fetched(name: str, option: str, say: Callable[[str], None] = print) -> Path:
    """A published set's file in the user's cache, fetched if it is not there; what it is and its licence are said once, when it is fetched.

    Raises:
        UserError: naming the option that takes a copy, if it cannot be fetched, or is not what was published.
    """
    known = PUBLISHED[name]
    from_there = f"see {known.url}, " if known.url else ""
    if not known.digest or not known.url or known.files:
        raise UserError(
            f"{option}: {name} is not fetched; {from_there}licence: {known.licence}; allowed is {known.layout} of yours"
        )
    place = cache_folder() / "diffalign" / "prompts" / name / Path(urlsplit(known.url).path).name
    if is_file(place) and known.digest_at(place) == known.digest:
        return place
    aside = place.with_suffix(f".{os.getpid()}")
    try:
        with urllib.request.urlopen(known.url, timeout=SECONDS) as answer:
            content = answer.read(LARGEST)
        place.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(content)
        if (digest := known.digest_at(aside)) != known.digest:
            aside.unlink()
            raise UserError(
                f"{option}: {known.url} has sha256 {digest[:12]}..., what was published has {known.digest[:12]}...; "
                f"allowed is {known.layout} of yours"
            )
        os.replace(aside, place)
    except OSError as error:
        raise UserError(
            f"{option}: {name} cannot be fetched ({one_line(error)}); download {known.url} and give its path"
        ) from error
    say(f"{name}: fetched {known.url}, sha256 {known.digest[:12]}..., licence {known.licence}, to {place}")
    return place
