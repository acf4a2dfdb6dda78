"""Adapters of the hub: a stand-in of it on loopback gives files, and says no."""

import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from diffalign import config as configs
from diffalign.errors import Fault, UserError
from diffalign.models import exporting
from diffalign.models.file_notes import public
from diffalign.models.hub_files import HubPlace
from diffalign.models.notes import LORA, Notes
from diffalign.models.places import Adapter, given, named
from diffalign.runs import session
from diffalign.sampling import merged, sources
from tests.kit.helpers import tiny_config

COMMITS = {"main": "a" * 40, "old": "b" * 40}
SPEED = f"owner/one/deep/speed.safetensors@{COMMITS['main']}"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as reading needs; `files` by repository, revision and name; `asked` is what it was asked for."""

    files: dict[str, dict[str, dict[str, bytes]]]
    asked: list[str]

    def do_GET(self):
        self.asked.append(self.path)
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[0] == "api":
            owner, name, revision = parts[2], parts[3], parts[5] if len(parts) > 5 else "main"
            found = self.found(f"{owner}/{name}", revision)
            if found is not None:
                listed = [{"rfilename": each} for each in found[1]]
                self.answer(json.dumps({"id": f"{owner}/{name}", "sha": found[0], "siblings": listed}).encode(), {})
            return
        owner, name, _, revision = parts[:4]
        found = self.found(f"{owner}/{name}", revision)
        if found is None:
            return
        content = found[1].get("/".join(parts[4:]))
        if content is None:
            return self.refuse(404, "EntryNotFound")
        self.answer(content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": found[0]})

    do_HEAD = do_GET

    def found(self, repository, revision):
        if repository not in self.files:
            return self.refuse(404, "RepoNotFound")
        commits = {commit: branch for branch, commit in COMMITS.items()}
        revision = commits.get(revision, revision)
        if revision not in self.files[repository]:
            return self.refuse(404, "RevisionNotFound")
        return COMMITS[revision], self.files[repository][revision]

    def refuse(self, code, why):
        self.send_response(code)
        self.send_header("X-Error-Code", why)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, content, headers):
        self.send_response(200)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("hubs") / "run"
    session.train(tiny_config(place, "optimizer.lr=0.02", "evaluation.enabled=false", "lora.rank=4"), quiet=True)
    return place


def at(monkeypatch, address):
    """As HF_ENDPOINT does at the start of a process."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def hub(run, tmp_path, monkeypatch):
    Hub.files, Hub.asked = {}, []
    made = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    at(monkeypatch, f"http://127.0.0.1:{made.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    ours = (run / "adapter" / LORA).read_bytes()
    exporting.export([Adapter(run / "adapter")], tmp_path / "kohya.safetensors", "kohya")
    theirs = (tmp_path / "kohya.safetensors").read_bytes()
    Hub.files |= {
        "owner/ours": {"main": {LORA: ours, "name-comfyui.safetensors": b"other", "README.md": b"x"}},
        "owner/one": {"main": {"deep/speed.safetensors": theirs}, "old": {"was.safetensors": ours}},
        "owner/two": {"main": {"a.safetensors": b"a", "b.safetensors": b"b"}},
        "owner/none": {"main": {"README.md": b"x"}},
    }
    yield Hub
    made.shutdown()
    made.server_close()


def test_l35_a_repository_stands_for_its_lora(run, hub):
    adapter = given("owner/ours:0.5")
    assert adapter.strength == 0.5 and adapter.place == f"owner/ours@{COMMITS['main']}"
    assert (adapter.folder / LORA).read_bytes() == (run / "adapter" / LORA).read_bytes()
    assert not (adapter.folder / "name-comfyui.safetensors").exists()  # nothing is fetched that is not asked for
    assert adapter.digest == Adapter(run / "adapter").digest
    one = given("owner/one")
    assert one.folder.name == "speed.safetensors" and one.place == SPEED
    whole = given("owner/one/deep/speed.safetensors:-1")
    assert (whole.folder, whole.strength) == (one.folder, -1)
    old = given("owner/one@old:2")
    assert old.folder.name == "was.safetensors" and old.place == f"owner/one/was.safetensors@{COMMITS['old']}"
    assert given(old.place).folder == old.folder


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("owner/two", "--adapter: owner/two has several files; .* owner/two/FILE: a.safetensors, b.safetensors"),
        ("owner/two/c.safetensors", "owner/two has no c.safetensors; it has a.safetensors, b.safetensors"),
        ("owner/none", "owner/none has no LoRA; it has no .safetensors"),
        ("owner/nobody", "--adapter: 'owner/nobody' is not on the hub, or private: check https"),
        ("owner/one@never", "'owner/one' has no revision 'never'"),
    ],
)
def test_what_is_not_there_is_the_users(place, said, hub):
    with pytest.raises(UserError, match=said):
        given(place)


def test_l35_offline_it_comes_from_the_cache(hub, monkeypatch):
    before = [given(place).folder for place in ("owner/ours", "owner/one")]
    at(monkeypatch, "http://127.0.0.1:9")
    for offline in (True, False):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        assert [given(place).folder for place in ("owner/ours", "owner/one")] == before
        with pytest.raises(
            Fault, match="--adapter: owner/two is not in the hub's cache, and the hub cannot be reached"
        ):
            given("owner/two")


def test_what_is_here_comes_first(run, hub, tmp_path):
    shutil.copytree(run / "adapter", tmp_path / "owner" / "ours")
    assert given("owner/ours").folder == Path("owner/ours")
    for mistyped in ("owner/our", "kohay.safetensors", "loras/kohya.safetensors"):
        with pytest.raises(UserError, match=r"no pytorch_lora_weights.safetensors there; allowed is .*OWNER/NAME"):
            given(mistyped)
    assert not hub.asked


def test_the_check_of_a_config_asks_nothing(hub):
    more = ["lora.start=owner/nobody", "lora.frozen=[owner/two:0.7, owner/one/x.safetensors]"]
    assert configs.load("flow_grpo/shapes-sd3", more).lora.start == "owner/nobody"
    assert named("owner/two:0.7", "lora.frozen") == ("owner/two", 0.7)
    assert HubPlace.of("owner/name/x.bin") is None and HubPlace.of("./owner/name") is None
    assert not hub.asked


def test_a_run_on_and_from_the_hub_remembers_the_commit(run, hub, tmp_path, capsys):
    more = ["lora.start=owner/ours", "lora.frozen=[owner/one:0.5]", "lora.rank=4", "evaluation.enabled=false"]
    session.train(tiny_config(tmp_path / "on", *more))
    said = capsys.readouterr().err
    assert f"lora.start: owner/ours@{COMMITS['main']} on the hub" in said
    assert f"lora.frozen: {SPEED} on the hub" in said
    notes = Notes.read(tmp_path / "on" / "adapter")
    assert notes.start == f"owner/ours@{COMMITS['main']}"
    assert [(spec["place"], spec["strength"]) for spec in notes.frozen] == [(SPEED, 0.5)]
    del Hub.files["owner/one"]  # the commit is in the cache
    source = sources.resolve(str(tmp_path / "on"))
    assert [str(each) for each in source.frozen] == [SPEED]
    local = ["lora.start=" + str(run), f"lora.frozen=[{tmp_path / 'kohya.safetensors'}:0.5]", *more[2:]]
    session.train(tiny_config(tmp_path / "off", *local), quiet=True)
    one, two = (load_file(tmp_path / name / "adapter" / LORA) for name in ("on", "off"))
    assert all((one[key] == two[key]).all() for key in one)


def test_an_adapter_of_another_model_is_refused_once_it_is_there(run, hub, tmp_path):
    save_file(load_file(run / "adapter" / LORA), tmp_path / "x.safetensors", metadata={"base_model": "owner/base"})
    Hub.files["owner/ours"]["main"] = {LORA: (tmp_path / "x.safetensors").read_bytes()}
    with pytest.raises(UserError, match="lora.start: .* belongs to owner/base, the run's model is shapes-sd3"):
        session.train(tiny_config(tmp_path / "run", "lora.start=owner/ours"), quiet=True)


def test_pictures_and_merges_from_the_hub(run, hub, tmp_path):
    assert str(sources.resolve("shapes-sd3", 1.0, ["owner/one"]).adapters[0]) == SPEED
    merged.write("owner/ours", [], tmp_path / "theirs")
    merged.write(str(run), [], tmp_path / "mine")
    one, two = (
        load_file(tmp_path / name / "transformer/diffusion_pytorch_model.safetensors") for name in ("theirs", "mine")
    )
    assert all((one[key] == two[key]).all() for key in one)


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("/home/me/run@130:0.5", "run@130:0.5"),
        ("/home/me/x.safetensors:0.7", "x.safetensors:0.7"),
        ("/home/me/run", "run"),
        ("pickscore@/home/me/weights", "pickscore@weights"),
        ("owner/name", "owner/name"),
        ("owner/name/x.safetensors@abc:0.5", "owner/name/x.safetensors@abc:0.5"),
    ],
)
def test_what_pages_call_a_place_says_nothing_of_this_machine(place, told):
    assert public(place) == told
