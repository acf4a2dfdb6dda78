"""What `push` sends: looked at as a stranger's hub gets it, on loopback."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard, constants
from safetensors import safe_open

from diffalign.errors import Fault, UserError
from diffalign.models.notes import LORA, Notes
from diffalign.runs import hub, session
from diffalign.shapes import models
from tests.kit.helpers import tiny_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("hub") / "run"
    session.train(tiny_config(place, "optimizer.lr=0.01"), quiet=True)
    return place


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a commit needs; what it was sent is in `sent`."""

    sent: ClassVar[dict[str, bytes]] = {}
    code = 200

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.endswith("/preupload/main"):
            asked = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.sent[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"commitUrl": "https://huggingface.co/owner/name/commit/1", "commitOid": "1", "hookOutput": ""}
        else:
            answer = {"url": "https://huggingface.co/owner/name", "name": "owner/name", "warnings": [], "errors": []}
        self.answer(answer)

    def do_GET(self):
        self.send_error(404)

    def answer(self, data):
        text = json.dumps(data).encode()
        self.send_response(self.code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    made = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{made.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    Hub.sent.clear()
    yield made
    made.shutdown()


def test_l27_a_dry_run_is_what_a_stranger_needs(run, tmp_path):
    said = hub.push(str(run), "owner/name", folder=tmp_path / "page")
    assert said[0].startswith(f"{tmp_path / 'page'}: ")
    assert said[1].startswith("license: ")
    names = {str(path.relative_to(tmp_path / "page")) for path in (tmp_path / "page").rglob("*") if path.is_file()}
    pictures = {f"images/{k}.png" for k in range(4)}
    assert names == {LORA, "README.md", "curves.png", "name-comfyui.safetensors", *pictures}
    card = ModelCard.load(tmp_path / "page" / "README.md")
    data = card.data.to_dict()
    assert data["base_model_relation"] == "adapter" and data["pipeline_tag"] == "text-to-image"
    assert {shot["output"]["url"] for shot in data["widget"]} == pictures
    assert all(shot["text"].startswith("a photo of") for shot in data["widget"])
    results = {result.metric_type: result for result in card.data.eval_results}
    assert "shapes_geneval" in results and "paired gain" in results["shapes_geneval"].metric_name
    everything = "".join(path.read_text() for path in (tmp_path / "page").glob("*.md"))
    for file in (tmp_path / "page").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            everything += json.dumps(opened.metadata())
    assert str(run) not in everything and "config.yaml" not in everything
    assert "pipe.load_lora_weights('owner/name')" in everything
    assert "`name-comfyui.safetensors` into `models/loras`" in everything


def test_what_is_sent_draws_the_runs_pictures(run, tmp_path):
    hub.push(str(run), "owner/name", folder=tmp_path / "page")

    def draw(place):
        pipe = DiffusionPipeline.from_pretrained(models.path("shapes-sd3"))
        pipe.load_lora_weights(place)
        call = {"num_inference_steps": 3, "guidance_scale": 1.0, "max_sequence_length": 1, "output_type": "np"}
        return pipe(["two stars"], generator=[torch.Generator().manual_seed(0)], **call).images[0]

    assert np.abs(draw(tmp_path / "page") - draw(run / "adapter")).max() < 1e-4


def test_a_base_that_a_stranger_has_not_is_not_pushed(run, tmp_path):
    with pytest.raises(UserError, match="its base shapes-sd3 ships with diffalign and is not on the hub; --dry-run"):
        hub.push(str(run), "owner/name")
    with pytest.raises(UserError, match="push: got 'name of mine', allowed is OWNER/NAME"):
        hub.push(str(run), "name of mine")
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="--dry-run: got .*which holds something"):
        hub.push(str(run), "owner/name", folder=tmp_path / "page")
    with pytest.raises(UserError, match="has no README.md; allowed are RUN"):
        hub.push(f"{run}@2", "owner/name", folder=tmp_path / "other")


@pytest.fixture
def known(monkeypatch):
    """As if the base were on the hub."""
    own = Notes.read

    def read(folder):
        notes = own(folder)
        return type(notes)(**{**vars(notes), "base_model": "owner/base"})

    monkeypatch.setattr(hub.Notes, "read", staticmethod(read))
    monkeypatch.setattr(hub, "_licence", lambda base: {"license": "other", "license_name": f"{base}'s"})


def test_it_is_sent_in_one_commit(run, server, known):
    said = hub.push(str(run), "owner/name", private=True)
    assert said[-1] == "https://huggingface.co/owner/name/commit/1"
    assert {LORA, "README.md", "images/0.png", "name-comfyui.safetensors"} <= Hub.sent.keys()
    assert b"base_model_relation: adapter" in Hub.sent["README.md"]
    assert b"license: other" in Hub.sent["README.md"] and not any(line.startswith("license") for line in said)


def test_a_hub_that_is_not_there_is_a_fault(run, known, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    with pytest.raises((Fault, UserError), match="push: owner/name: "):
        hub.push(str(run), "owner/name")
