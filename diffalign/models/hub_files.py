"""LoRA files of the Hugging Face hub: OWNER/NAME, OWNER/NAME/FILE.safetensors, with @REVISION if another than the newest is meant.

What is fetched is in the hub's own cache, where it is found again without a connection. Needs no torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from diffalign.errors import Fault, UserError, one_line
from diffalign.models.notes import LORA, PEFT_CONFIG, PEFT_FILE
from diffalign.runtime.files import HUB_ID

_PLACE = re.compile(rf"({HUB_ID.pattern})((?:/[^/@]+)*\.safetensors)?(?:@([\w./-]+))?")
_SHOWN = 12  # files in a message


@dataclass(frozen=True)
class HubPlace:
    """A repository, a file in it, empty where it has but one, and a branch, tag or commit, None for the newest."""

    repository: str
    file: str = ""
    revision: str | None = None

    @classmethod
    def of(cls, text: str) -> HubPlace | None:
        """What a text names on the hub; None if it cannot be that, or begins with a folder that is here."""
        found = _PLACE.fullmatch(text)
        if found is None or found[1].endswith(".safetensors") or Path(found[1]).parent.is_dir():
            return None
        return cls(found[1], (found[2] or "").removeprefix("/"), found[3])

    def __str__(self) -> str:
        return self.repository + (f"/{self.file}" if self.file else "") + (f"@{self.revision}" if self.revision else "")


def fetch(place: HubPlace, key: str) -> tuple[Path, HubPlace]:
    """Where a place's file, or the first of its files, is on this machine, and the place with its commit.

    Raises:
        UserError: if there is no such repository, revision or file, it is closed to the user, or it has several; `key`: what it was given
            with.
        Fault: if the hub cannot be reached, and it is not in the hub's cache.
    """
    from huggingface_hub import hf_hub_download

    try:
        names = _names(place)
        wanted = _wanted(place, names, key)
        # By the name of the branch, so that the cache knows what it stands for.
        paths = [Path(hf_hub_download(place.repository, name, revision=place.revision)) for name in wanted]
    except UserError:
        raise
    except Exception as error:  # a missing repository, no connection: each library below has its own
        if why := refusal(place.repository, place.revision, error):
            raise UserError(f"{key}: {why}") from error
        raise Fault(
            f"{key}: {place} is not in the hub's cache, and the hub cannot be reached ({one_line(error)})"
        ) from error
    first = paths[0]
    commit = first.parents[len(PurePosixPath(wanted[0]).parts) - 1].name
    return first, HubPlace(place.repository, "" if wanted[0] == LORA else wanted[0], commit)


def _names(place: HubPlace) -> list[str]:
    """The files of a repository; where there is no connection, those of it that were fetched before."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if place.file and re.fullmatch("[0-9a-f]{40}", place.revision or "") and (own := _fetched(place)):
        return own  # a commit's files never change
    try:
        info = HfApi().model_info(place.repository, revision=place.revision)
        return [each.rfilename for each in info.siblings or ()]
    except HfHubHTTPError:
        raise
    except Exception:
        if own := _fetched(place):
            return own
        raise


def _fetched(place: HubPlace) -> list[str]:
    """The files of a place's repository in the hub's cache; none if the file is not among them."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(place.repository, revision=place.revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return []
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return found if not place.file or place.file in found else []


def _wanted(place: HubPlace, names: list[str], key: str) -> list[str]:
    """The files to fetch, what is loaded first."""
    several = sorted(name for name in names if name.endswith(".safetensors"))
    listed = ", ".join(several[:_SHOWN]) + (f" and {len(several) - _SHOWN} more" if len(several) > _SHOWN else "")
    own = [name for name in (LORA, PEFT_FILE) if name in several][:1]  # what libraries take there without a name
    found = [name for name in names if name == place.file] if place.file else own or several
    if not found:
        raise UserError(
            f"{key}: {place.repository} has no {place.file or 'LoRA'}; it has {listed or 'no .safetensors'}"
        )
    if len(found) > 1:
        raise UserError(f"{key}: {place} has several files; allowed is one of them, {place.repository}/FILE: {listed}")
    if found[0] == LORA:  # of two denoisers each has its own
        return [LORA, *(name for name in several if re.fullmatch(LORA.replace(".s", r"\.\w+\.s"), name))]
    beside = str(PurePosixPath(found[0]).with_name(PEFT_CONFIG))
    return [found[0], *([beside] if found[0].endswith(PEFT_FILE) and beside in names else [])]


def refusal(repository: str, revision: str | None, error: Exception) -> str:
    """What the user can do about a repository that the hub does not give; empty if that is not why it cannot be had."""
    from huggingface_hub import errors

    causes = [error, error.__cause__, error.__context__]
    page = f"https://huggingface.co/{repository}"

    def is_a(*kinds: type) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if is_a(errors.GatedRepoError):
        return f"{repository!r} is gated: accept its terms at {page} and log in with `hf auth login`, or give a folder"
    if is_a(errors.RevisionNotFoundError):
        return f"{repository!r} has no revision {revision!r}; its branches, tags and commits are at {page}"
    if is_a(errors.RepositoryNotFoundError):
        return (
            f"{repository!r} is not on the hub, or private: check {page}, log in with `hf auth login`, or give a folder"
        )
    return ""
