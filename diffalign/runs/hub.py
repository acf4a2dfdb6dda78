"""`diffalign push`: an adapter's repository on the Hugging Face hub: the LoRA as diffusers and ComfyUI read it, its page, pictures and
config, and nothing of this machine."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from diffalign.errors import Fault, UserError, one_line, shown
from diffalign.models import exporting
from diffalign.models.file_notes import public
from diffalign.models.layer_names import COMFYUI
from diffalign.models.notes import LORA, Notes
from diffalign.models.places import Adapter, given
from diffalign.runtime import yaml_text
from diffalign.runtime.files import HUB_ID, make_folder

USAGE = """
In ComfyUI: `{file}` into `models/loras`, strength 1.
"""


def push(target: str, repository: str, private: bool = False, folder: Path | None = None) -> list[str]:
    """Send it, or write what would be sent to a folder; returns what to tell.

    Raises:
        UserError: for an adapter without a page, a base that is not on the hub, or a hub that refuses.
        Fault: if the hub cannot be reached.
    """
    if not HUB_ID.fullmatch(repository):
        raise UserError(f"push: got {shown(repository)}, allowed is OWNER/NAME")
    adapter = given(target, "push")
    try:
        notes = Notes.read(adapter.folder)
    except (ValueError, NotADirectoryError) as error:
        raise UserError(f"push: {error}") from error
    if not (adapter.folder / "README.md").is_file():
        raise UserError(
            f"push: {adapter.folder} has no README.md; allowed are RUN, its adapter/ and its best/, once it is done"
        )
    if folder is None and (why := _nowhere(notes)):
        raise UserError(f"push: {why}; --dry-run FOLDER writes what would be sent")
    if folder is not None:
        make_folder(folder, "--dry-run")
        if any(folder.iterdir()):
            raise UserError(f"--dry-run: got {str(folder)!r}, which holds something; name a new folder")
        return _listed(folder, write(adapter, notes, repository, folder))
    with tempfile.TemporaryDirectory() as made:
        files = write(adapter, notes, repository, Path(made))
        return [*_listed(Path(repository), files), _sent(Path(made), repository, private)]


def _nowhere(notes: Notes) -> str:
    """Why a stranger could not use it; empty if she can."""
    from diffalign.shapes import models

    if models.path(notes.base_model):
        return f"its base {notes.base_model} ships with diffalign and is not on the hub"
    if not HUB_ID.fullmatch(notes.base_model) or Path(notes.base_model).exists():
        return f"its base {public(notes.base_model)} is a folder, not a model of the hub"
    return ""


def write(adapter: Adapter, notes: Notes, repository: str, folder: Path) -> list[Path]:
    """Everything that is sent, into a folder."""
    one = [adapter]
    exporting.export(one, folder / LORA, "diffusers")
    usage = ""
    if notes.denoisers and notes.denoisers[0] in COMFYUI:
        name = f"{repository.partition('/')[2]}-comfyui.safetensors"
        exporting.export(one, folder / name, "comfyui")
        usage = USAGE.format(file=name)
    for name in ("curves.png", "images"):
        source = adapter.folder / name
        if source.is_dir():
            shutil.copytree(source, folder / name)
        elif source.is_file():
            shutil.copy(source, folder / name)
    text = (adapter.folder / "README.md").read_text(encoding="utf-8")
    (folder / "README.md").write_text(_page(text, notes, repository, usage), encoding="utf-8")
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _page(text: str, notes: Notes, repository: str, usage: str) -> str:
    """An adapter's own page as the hub's: loaded from there, under its base's licence, without what was not sent."""
    _, head, body = text.split("---\n", 2)
    told: dict[str, Any] = yaml_text.parse(head, "README.md")
    licence = _licence(notes.base_model)
    body = body.replace('pipe.load_lora_weights(".")  # this folder', f"pipe.load_lora_weights({repository!r})")
    body = body.replace("The resolved config is in `config.yaml`.\n", usage.lstrip("\n"))
    return f"---\n{yaml_text.dump({**told, **licence})}---\n{body}"


def _licence(base: str) -> dict[str, Any]:
    """What the base's page says of its licence: an adapter of it is not ours to license otherwise."""
    if not HUB_ID.fullmatch(base) or Path(base).exists():
        return {}
    from huggingface_hub import ModelCard

    try:
        data = ModelCard.load(base).data.to_dict()
    except Exception:  # no page, no hub: the licence is left open, and the user is told
        return {}
    return {key: data[key] for key in ("license", "license_name", "license_link") if data.get(key)}


def _listed(where: Path, files: list[Path]) -> list[str]:
    total = sum(path.stat().st_size for path in files)
    page = next(path for path in files if path.name == "README.md").read_text(encoding="utf-8")
    open_licence = [] if "\nlicense:" in page else ["license: the base's page says none here; add it to README.md"]
    return [f"{where}: {len(files)} files, {total / 2**20:.1f} MiB", *open_licence]


def _sent(folder: Path, repository: str, private: bool) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    hub = HfApi()
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        done = hub.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Adapter trained with diffalign"
        )
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        raise UserError(f"push: {repository}: {one_line(error)}; log in with `hf auth login`") from error
    except Exception as error:  # no connection: each library below has its own
        raise Fault(f"push: {repository}: the hub cannot be reached ({one_line(error)})") from error
    return str(done.commit_url)
