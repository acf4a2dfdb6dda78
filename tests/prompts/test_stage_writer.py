"""Stage prompts: from the shapes world, from a file, from a model behind an endpoint."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from diffalign import config
from diffalign.errors import Fault, UserError
from diffalign.prompts import book, stage_writer, stages
from diffalign.shapes import captions
from tests.kit.helpers import tiny_config

ENTRIES = [{"prompt": "a photo of a cat"}, {"prompt": "a photo of a dog"}]


def test_shapes_come_first_and_colours_later():
    assert captions.stages("a photo of three red squares")[0] == "a photo of three squares"
    assert (
        captions.stages("a photo of an orange circle left of a blue square")[0]
        == "a photo of a circle left of a square"
    )
    for task in captions.TASKS:
        known = {entry["prompt"] for split in captions.SPLITS for entry in captions.captions(task, split)}
        everything = {
            entry["prompt"] for t in captions.TASKS for s in captions.SPLITS for entry in captions.captions(t, s)
        }
        for prompt in known:
            coarse, middle, fine = captions.stages(prompt)
            assert coarse in everything
            assert (middle, fine) == (prompt, prompt)


def read(source, entries):
    return stages.of(stages.table(source), entries, source)


def file(tmp_path, *lines):
    path = tmp_path / "stages.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return str(path)


def test_a_file_tells_each_prompt_its_stages(tmp_path):
    lines = [{"prompt": entry["prompt"], "stages": [f"{k} {entry['prompt']}" for k in range(2)]} for entry in ENTRIES]
    found = read(file(tmp_path, *lines), ENTRIES)
    drawn = book.draw(ENTRIES, 2, 2, 0, 0, found)
    assert drawn.stages == [(f"0 {text}", f"1 {text}") for text in drawn.text]
    assert drawn.on_stretch(1).text == [f"1 {text}" for text in drawn.text]
    assert drawn.select([3, 0]).stages == [drawn.stages[3], drawn.stages[0]]
    assert book.fixed(ENTRIES, 1, 0).on_stretch(0).text == [entry["prompt"] for entry in ENTRIES]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([{"prompt": "a photo of a cat", "stages": ["a", "b"]}], "lacks 1 of 2 prompts, such as 'a photo of a dog'"),
        ([{"prompt": "a photo of a cat", "stages": "a"}], "has stages 'a', expected a list of texts"),
        ([{"prompt": e["prompt"], "stages": ["a"] * (k + 1)} for k, e in enumerate(ENTRIES)], "has 1 to 2 stages"),
    ],
)
def test_what_a_file_lacks_is_named(tmp_path, lines, expected):
    with pytest.raises(UserError, match=expected):
        read(file(tmp_path, *lines), ENTRIES)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["prompts.stretches=[0, 1]"], "prompts.stretches: got [0, 1] without prompts.stages"),
        (["evaluation.stages=true"], "evaluation.stages: got true without prompts.stages"),
        (
            ["prompts.stages=shapes", "sampler.steps=2"],
            "prompts.stages: got 3 stages, allowed are up to sampler.steps (2)",
        ),
        (
            ["prompts.stages=shapes", "prompts.stretches=[0, 2]"],
            "prompts.stretches: got [0, 2], allowed are 3 rising steps",
        ),
        (["prompts.stages=nowhere.jsonl"], "prompts.stages: 'nowhere.jsonl' is no file"),
    ],
)
def test_settings_that_do_not_fit_are_named(tmp_path, overrides, expected):
    with pytest.raises(UserError) as error:
        tiny_config(tmp_path, *overrides)
    assert any(expected in line for line in error.value.problems)


def test_stretches_are_even_unless_given(tmp_path):
    assert tiny_config(tmp_path).book.stretches == (0,)
    assert tiny_config(tmp_path, "prompts.stages=shapes", "sampler.steps=10").book.stretches == (0, 3, 6)
    given = tiny_config(tmp_path, "prompts.stages=shapes", "sampler.steps=10", "prompts.stretches=[0, 1, 9]")
    assert given.book.stretches == (0, 1, 9)


# -- an endpoint


class Endpoint:
    """Answers `/chat/completions` from a list of (status, content), the last one for ever."""

    def __init__(self, *answers):
        self.asked, self.keys, self.answers = [], [], list(answers)
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.asked.append((self.path, body))
                endpoint.keys.append(self.headers.get("Authorization"))
                status, content = endpoint.answers.pop(0) if len(endpoint.answers) > 1 else endpoint.answers[0]
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps({"choices": [{"message": {"content": content}}]}).encode())

            def log_message(self, *args):
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setattr(stage_writer, "PAUSE", 0.0)
    servers = []

    def start(*answers):
        servers.append(Endpoint(*answers))
        return servers[-1]

    yield start
    for server in servers:
        server.server.shutdown()
        server.server.server_close()


GOOD = 'Here you are:\n```json\n["one", "two", "three"]\n```'


def ask(endpoint, path, key=None, count=3):
    return stage_writer.write(ENTRIES, path, endpoint.url, "some-model", key, count, lambda line: None)


def test_answers_become_a_file_that_a_config_takes(serve, tmp_path):
    endpoint, path = serve((200, GOOD)), tmp_path / "s.jsonl"
    assert ask(endpoint, path, key="secret") == 2
    assert read(str(path), ENTRIES)["a photo of a cat"] == ("one", "two", "three")
    (where, body), *_ = endpoint.asked
    assert where == "/v1/chat/completions"
    assert body["model"] == "some-model"
    assert "a photo of a cat" in body["messages"][0]["content"]
    assert endpoint.keys[0] == "Bearer secret"


def test_what_is_written_is_not_asked_for_again(serve, tmp_path):
    path = tmp_path / "s.jsonl"
    broken = serve((200, GOOD), (500, ""))
    with pytest.raises(Fault, match="'a photo of a dog' in 4 attempts: status 500"):
        ask(broken, path)
    whole = serve((200, GOOD))
    assert ask(whole, path) == 1
    assert len(read(str(path), ENTRIES)) == 2


def test_a_passing_failure_is_tried_again(serve, tmp_path):
    endpoint = serve((503, ""), (429, ""), (200, "no list"), (200, GOOD))
    assert ask(endpoint, tmp_path / "s.jsonl") == 2
    assert len(endpoint.asked) == 5


@pytest.mark.parametrize("content", ["no list", '["one", "two"]', '["one", 2, "three"]', "[", '["", "a", "b"]'])
def test_an_answer_of_another_form_is_a_fault(serve, tmp_path, content):
    with pytest.raises(Fault, match="no JSON list of 3 strings"):
        ask(serve((200, content)), tmp_path / "s.jsonl")


def test_a_refusal_and_a_wrong_file_are_the_users(serve, tmp_path):
    with pytest.raises(UserError, match="refused \\(401\\)"):
        ask(serve((401, "")), tmp_path / "s.jsonl")
    with pytest.raises(UserError, match="--endpoint"):
        stage_writer.write(ENTRIES, tmp_path / "s.jsonl", "nowhere", "m", None, 3, print)
    other = tmp_path / "other.txt"
    other.write_text("a text\n")
    with pytest.raises(UserError, match="line 1 is no stage prompt"):
        ask(serve((200, GOOD)), other)
    path = tmp_path / "three.jsonl"
    ask(serve((200, GOOD)), path)
    with pytest.raises(UserError, match="has 3 stages, not 2"):
        ask(serve((200, GOOD)), path, count=2)


def test_a_dead_endpoint_is_a_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(stage_writer, "PAUSE", 0.0)
    with pytest.raises(Fault, match="ConnectError"):
        stage_writer.write(ENTRIES, tmp_path / "s.jsonl", "http://127.0.0.1:9", "m", None, 3, print)


def test_the_config_command_shows_the_keys():
    assert any("stages: null" in line for line in config.explained(config.load("rlr/shapes-sd3")))


def test_a_prompt_has_one_set_of_stages(tmp_path):
    path = tmp_path / "stages.jsonl"
    path.write_text('{"prompt": "a", "stages": ["b", "c"]}\n{"prompt": "a", "stages": ["b", "d"]}\n')
    with pytest.raises(UserError, match="has 'a' twice, with different stages"):
        read(str(path), [{"prompt": "a"}])
