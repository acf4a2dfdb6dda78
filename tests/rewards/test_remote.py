"""Rewards behind a server: what travels, what is tried again, what is refused, and runs that outlive their server."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import numpy as np
import pytest
import torch

from diffalign import config
from diffalign.errors import Fault, UserError
from diffalign.rewards import catalog, wire
from diffalign.rewards.base import to_uint8
from diffalign.rewards.load import load
from diffalign.rewards.remote import Remote
from diffalign.rewards.scorer import Scorer
from diffalign.rewards.server import Served, application
from diffalign.rewards.wire import packed, unpacked
from diffalign.runs.folder import open_run, read_rows
from diffalign.runs.progress import Reporter
from diffalign.runs.session import Session
from diffalign.runtime import http
from diffalign.types import Media, Prompts
from tests.kit.helpers import checkpoints, saved_state, tiny_config


def samples(n, frames=1, size=8):
    pixels = torch.rand(n, frames, 3, size, size, generator=torch.Generator().manual_seed(n))
    keys = np.arange(n)
    return Media(pixels), Prompts([str(k) for k in range(n)], keys, keys, keys, [{"k": k} for k in range(n)])


class Server:
    """Answers each request by `reply(body) -> (status, content)`, and counts them; what is asked for without a body by `got(path)`."""

    def __init__(self, reply, port=0, got=lambda path: (404, {})):
        self.bodies = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler):
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                self.bodies.append((body, handler.headers.get("Authorization")))
                handler.answer(*reply(body))

            def do_GET(handler):
                handler.answer(*got(handler.path))

            def answer(handler, status, content):
                sent = content if isinstance(content, bytes) else json.dumps(content).encode()
                handler.send_response(status)
                handler.send_header("Content-Length", str(len(sent)))
                handler.end_headers()
                handler.wfile.write(sent)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/score"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()


def names(body):
    return 200, {"scores": [float(m["k"]) for m in body["metadata"]]}


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(http, "PAUSE", 0.02)
    monkeypatch.setattr(http, "LONGEST", 0.1)


@pytest.mark.parametrize("form", ["png", "raw"])
@pytest.mark.parametrize("frames", [1, 3])
def test_pixels_travel_without_loss(form, frames):
    media, _ = samples(2, frames)
    sent = json.loads(json.dumps(packed(media, form)))
    assert np.array_equal(to_uint8(Media(unpacked(sent))), to_uint8(media))


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (None, "expected an object with format"),
        ({"format": "pickle", "data": ""}, "expected an object with format"),
        ({"format": "raw", "shape": [1, 1, 2, 2, 3], "data": ""}, "does not fit 0 bytes"),
        ({"format": "raw", "shape": [1, 1, -2, -2, 3], "data": base64.b64encode(bytes(12)).decode()}, "does not fit"),
        ({"format": "raw", "shape": [10**9] * 5, "data": base64.b64encode(bytes(12)).decode()}, "does not fit"),
        ({"format": "raw", "shape": "x", "data": "?"}, "not base64"),
        ({"format": "png", "data": [["AAAA"]]}, "not a PNG file"),
        ({"format": "png", "data": ["AAAA"]}, "list of lists"),
        ({"format": "png", "data": []}, "list of lists"),
    ],
)
def test_media_that_are_none_are_named(given, problem):
    with pytest.raises(ValueError, match=problem):
        unpacked(given)


def test_samples_of_several_sizes_are_refused():
    small, large = (packed(samples(1, size=size)[0])["data"][0] for size in (4, 8))
    with pytest.raises(ValueError, match="one size"):
        unpacked({"format": "png", "data": [small, large]})


def test_batches_go_round_the_servers_and_come_back_in_order():
    slow = Server(lambda body: (time.sleep(0.05), names(body))[1])
    fast = Server(names)
    reward = Remote("r", [slow.url, fast.url], deadline=10, batch=3)
    assert reward(*samples(20)) == list(range(20))
    assert len(slow.bodies) + len(fast.bodies) == 7
    assert slow.bodies
    assert fast.bodies
    slow.close()
    fast.close()


def test_a_reward_that_keeps_failing_is_not_asked_until_the_deadline():
    server = Server(lambda body: (500, {"error": "KeyError: 'x'"}))
    reward = Remote("r", [server.url], deadline=60)
    started = time.monotonic()
    assert np.isnan(reward(*samples(2))).all()
    assert time.monotonic() - started < 5
    assert len(server.bodies) == http.FAILURES
    assert "KeyError: 'x'" in reward.said
    server.close()


def test_a_server_is_greeted_before_anything_is_begun(monkeypatch):
    with pytest.raises(Fault, match=r"reward r: no server answers \(http://127.0.0.1:1/score: ConnectError"):
        Remote("r", ["http://127.0.0.1:1/score"], deadline=0.1).greet()
    for status, problem in ((401, "wants another token .401.; set DIFFALIGN"), (404, "is not where scores are .404.")):
        server = Server(lambda body, status=status: (status, {}))
        with pytest.raises(UserError, match=problem):
            Remote("r", [server.url], deadline=5).greet()
        server.close()
    late = socket.socket()
    late.bind(("127.0.0.1", 0))
    port = late.getsockname()[1]
    late.close()
    started: list[Server] = []
    threading.Timer(0.3, lambda: started.append(Server(lambda body: (422, {}), port))).start()
    said: list[str] = []
    Remote("r", [f"http://127.0.0.1:{port}/score"], deadline=10).greet(
        said.append
    )  # it waits for one that is not up yet
    assert [line.startswith(f"waiting for http://127.0.0.1:{port}/score, up to 10 s (") for line in said] == [True]
    begun = time.monotonic()
    Remote("r", ["http://127.0.0.1:1/score", f"http://127.0.0.1:{port}/score"], deadline=60).greet()  # one will do
    assert time.monotonic() - begun < 10
    started[0].close()


def test_addresses_of_different_rewards_are_not_mixed():
    (first, one), (second, two), (third, three) = (
        served(0, name) for name in ("shapes_geneval", "shapes_geneval", "jpeg_compressibility")
    )
    try:
        Remote("r", [one, two], deadline=10).greet()
        with pytest.raises(
            UserError, match=r"must serve one reward, they serve shapes_geneval .*, jpeg_compressibility"
        ):
            Remote("r", [one, three], deadline=10).greet()
    finally:
        for process in (first, second, third):
            process.kill()


@pytest.mark.parametrize("token", ["s\u00e9cret", "a\nb", " ", ""])
def test_a_token_that_no_header_carries_is_refused_at_both_ends(token, monkeypatch):
    from diffalign.rewards.server import serve

    monkeypatch.setenv("DIFFALIGN_REWARD_TOKEN", token)
    with pytest.raises(UserError, match="DIFFALIGN_REWARD_TOKEN: allowed are printable ASCII characters"):
        load("http://127.0.0.1:1/score")
    with pytest.raises(UserError, match="--token: allowed are printable ASCII characters"):
        serve("shapes_geneval", "127.0.0.1", 0, token, 1)


def test_a_small_file_of_many_pixels_is_refused():
    for form in ("png", "raw"):
        assert unpacked(packed(samples(3)[0], form), 576).shape == (3, 1, 3, 8, 8)
        with pytest.raises(wire.TooMuch, match="576.*send fewer samples"):
            unpacked(packed(samples(4)[0], form), 576)


@pytest.mark.parametrize("trouble", [(503, {}), (429, {}), (500, {"error": "boom"})])
def test_what_may_pass_is_tried_again(trouble):
    answers = iter([trouble, trouble])
    server = Server(lambda body: next(answers, None) or names(body))
    assert Remote("r", [server.url], deadline=10)(*samples(4)) == [0, 1, 2, 3]
    assert len(server.bodies) == 3
    server.close()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((422, {"error": "metadata: r needs include"}), "refused .422.: .*metadata: r needs include"),
        ((401, {"error": "token"}), "refused .401."),
        ((200, {"scores": [1.0]}), "answered 1 scores for 2 samples"),
        ((200, {"score": [1.0]}), "expected scores"),
        ((200, b"\x80\x04pickle"), "expected JSON"),
        ((200, {"scores": ["good", 1]}), "answered 'good' among its scores, expected numbers and null"),
        ((200, {"scores": ["0.5", 1]}), "expected numbers and null"),
        ((200, {"scores": {"0": 0.5, "1": 1}}), "expected scores"),
        ((200, {"scores": "11"}), "expected scores"),
        ((200, {"scores": [True, 1]}), "expected numbers and null"),
        ((200, {"scores": [0, 0], "error": "boom"}), "expected scores"),
        ((200, [0, 0]), "expected scores"),
        ((200, b'{"scores": [1e400, 1]}'), "expected JSON: 1e400 is too large a number"),
        ((200, b'{"scores": [NaN, 1]}'), "expected JSON: NaN is no number"),
        ((200, b'{"scores": ' + b"[" * 100000), "expected JSON: more than 50 levels"),
        ((200, b" " * (2**22 + 1)), "answered more than 4194304 bytes"),
        ((307, {}), "refused .307"),
    ],
)
def test_what_will_not_pass_is_a_fault_at_once(answer, said):
    server = Server(lambda body: answer)
    with pytest.raises(Fault, match=said):
        Remote("r", [server.url], deadline=10)(*samples(2))
    assert len(server.bodies) == 1
    server.close()


def test_a_sample_without_a_score_is_no_number():
    server = Server(lambda body: (200, {"scores": [1.0, None, 3.0]}))
    found = Remote("r", [server.url])(*samples(3))
    assert found[0::2] == [1.0, 3.0]
    assert np.isnan(found[1])
    server.close()


def test_a_dead_server_costs_its_deadline_once():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    reward = Remote("r", [f"http://127.0.0.1:{port}/score"], deadline=1.0, batch=2)
    started = time.monotonic()
    assert np.isnan(reward(*samples(4))).all()
    assert 0.9 < time.monotonic() - started < 5
    assert "ConnectError" in reward.said
    started = time.monotonic()
    assert np.isnan(reward(*samples(4))).all()
    assert time.monotonic() - started < 0.9  # once each, without the deadline
    server = Server(names, port)
    assert reward(*samples(4)) == [0, 1, 2, 3]  # and it is asked again
    server.close()


def test_the_token_is_sent(monkeypatch):
    monkeypatch.setenv(http.TOKEN, "secret")
    server = Server(names)
    Remote("r", [server.url])(*samples(1))
    assert server.bodies[0][1] == "Bearer secret"
    server.close()


def test_rewards_in_the_background_score_while_others_do():
    media, prompts = samples(2)
    release = threading.Event()

    def waiting(media, prompts):
        assert not torch.is_grad_enabled()
        assert threading.current_thread() is not threading.main_thread()
        assert release.wait(10)
        return [1.0, 2.0]

    waiting.background = True

    def here(media, prompts):
        release.set()
        return [10.0, 20.0]

    answer = Scorer({"a": waiting, "b": here}).begin(media, prompts)
    assert answer().total.tolist() == [11, 22]


def test_a_failure_in_the_background_is_a_fault_too():
    def broken(media, prompts):
        raise ValueError("no")

    broken.background = True
    with pytest.raises(Fault, match="reward a: ValueError: no"):
        Scorer({"a": broken}).scores(*samples(2))


# -- the server


def client(name="shapes_geneval_partial", **more):
    from starlette.testclient import TestClient

    return TestClient(application(Served(name), **more))


def request(n=2, **more):
    media, prompts = samples(n, size=64)
    wanted = {"include": [{"class": "circle", "count": 1}], "tag": "single_object"}
    return {"prompts": prompts.text, "metadata": [wanted] * n, "media": packed(media)} | more


def test_the_server_gives_what_the_reward_gives():
    media, prompts = samples(2, size=64)
    prompts.metadata[:] = request()["metadata"]
    expected = load("shapes_geneval_partial")(Media(torch.round(media.pixels * 255) / 255), prompts)
    answer = client().post("/score", json=request())
    assert answer.status_code == 200
    assert answer.json()["scores"] == expected
    health = client().get("/health").json()
    assert health["name"] == "shapes_geneval_partial"
    assert health["needs"] == ["include"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"prompts": []}, "prompts: expected a list of texts"),
        ({"prompts": ["a", 5]}, "prompts: expected a list of texts"),
        ({"metadata": [{}]}, "metadata: expected 2 objects"),
        ({"metadata": None}, "metadata: shapes_geneval_partial needs 'include'"),
        ({"media": {"format": "pickle"}}, "media: expected an object with format"),
        ({"metadata": [{"include": []}] * 2}, "metadata: shapes_geneval_partial got 'include' []"),
        ({"metadata": [{"include": [{"class": "star", "count": "many"}]}] * 2}, "allowed is a list of objects such as"),
        ({"prompts": ["a", "b", "c"], "metadata": [request()["metadata"][0]] * 3}, "media: 2 samples for 3 prompts"),
        ({"fps": "fast"}, "fps: got 'fast', allowed are numbers above 0"),
        ({"fps": None}, "fps: got None"),
    ],
)
def test_bad_requests_are_told_what_is_wrong(change, problem):
    answer = client().post("/score", json=request() | change)
    assert answer.status_code == 422
    assert problem in answer.json()["error"]


@pytest.mark.parametrize("body", [b"x", b"[" * 100_000, b"5", b"\x80\x04."])
def test_what_is_no_json_object_is_refused(body):
    assert client().post("/score", content=body).status_code == 422


def test_size_and_token_are_limits():
    assert client(most_bytes=100).post("/score", json=request()).status_code == 413
    guarded = client(token="secret")
    assert guarded.post("/score", json=request()).status_code == 401
    assert guarded.post("/score", json=request(), headers={"Authorization": "Bearer secret"}).status_code == 200


def test_a_reward_that_fails_is_the_servers_fault(tmp_path):
    (tmp_path / "bad.py").write_text("def f(media, prompts):\n    raise OSError('disk')\n")
    answer = client(f"{tmp_path}/bad.py:f").post("/score", json=request())
    assert answer.status_code == 500
    assert "OSError: disk" in answer.json()["error"]


def test_an_address_others_can_reach_needs_a_token():
    from diffalign.rewards.server import serve

    with pytest.raises(UserError, match=r"--host: got 0\.0\.0\.0, which others can reach; set a token"):
        serve("shapes_geneval", "0.0.0.0", 0, None, 1)
    server = Server(names)
    port = int(server.url.split(":")[2].split("/")[0])
    with pytest.raises(UserError, match=f"--port: 127.0.0.1:{port}: Address already in use; name another"):
        serve("shapes_geneval", "127.0.0.1", port, None, 1)
    server.close()


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("http://", "is no address"),
        ("http://a/score|ftp://b/score", "is no address"),
        ("http://user:pass@host/score", "set DIFFALIGN_REWARD_TOKEN"),
        ("http://host:99999/score", "is no address"),
        ("|http://host/score", "is no address"),
    ],
)
def test_addresses_are_checked_before_anything_loads(name, problem):
    with pytest.raises(UserError, match=problem):
        config.load("flow_grpo/shapes-sd3", [f'rewards={{"{name}": 1.0}}'])


def test_an_installed_package_gives_a_reward_a_name(tmp_path, monkeypatch):
    place = tmp_path / "mine-1.0.dist-info"
    place.mkdir()
    (place / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (place / "entry_points.txt").write_text("[diffalign.rewards]\ngreyness = mine_rewards:grey\n")
    (tmp_path / "mine_rewards.py").write_text("def grey(media, prompts):\n    return [0.5] * len(prompts)\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert catalog.find("greyness").attribute == "grey"
    assert load("greyness")(*samples(2)) == [0.5, 0.5]


# -- whole runs


def served(port, name="shapes_geneval_partial"):
    """`diffalign serve-reward` in a process of its own, ready to answer."""
    command = [sys.executable, "-m", "diffalign", "serve-reward", name, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith(f"{name} at http://127.0.0.1:"), line
    return process, line.split(" at ")[1].strip()


def run(folder, url, *overrides):
    settings = tiny_config(
        folder, f'rewards={{"{url}": 1.0}}', "eval_rewards=[]", "updates=3", "scoring.batch=2", *overrides
    )
    return Session(settings, open_run(settings, False), Reporter(quiet=True))


def scores_of(folder, url):
    rows = [row[f"reward/{url}"] for row in read_rows(folder) if f"reward/{url}" in row]
    ends = [json.loads(path.read_text())["scores"][url] for path in sorted((folder / "evaluation").glob("*.json"))]
    return rows, ends, [row["scores"][url] for row in read_rows(folder, "scores.jsonl")]


def test_a_server_killed_and_restarted_changes_no_score(tmp_path):
    process, url = served(0)
    port = int(url.split(":")[2].split("/")[0])
    assert httpx.get(url.replace("score", "health")).json()["name"] == "shapes_geneval_partial"
    made = run(tmp_path / "whole", url)
    made.run()
    made.folder.close()

    made = run(tmp_path / "cut", url)
    update, kept = made.trainer.update, []

    def interrupted(index):
        if index == 1:
            process.send_signal(signal.SIGKILL)
            process.wait()
            threading.Timer(1.0, lambda: kept.append(served(port)[0])).start()
        return update(index)

    made.trainer.update = interrupted
    made.run()
    made.folder.close()
    kept[0].kill()
    whole, cut = scores_of(tmp_path / "whole", url), scores_of(tmp_path / "cut", url)
    assert len(whole[0]) == 3
    assert len(whole[1]) == 2
    assert [len(scores) for scores in whole[2]] == [4, 4, 4]
    assert len(set(whole[1][0])) > 1  # the scores say something
    assert whole == cut  # sample by sample


def test_a_server_that_stays_dead_ends_the_run_and_leaves_a_checkpoint(tmp_path):
    process, url = served(0)
    made = run(tmp_path / "run", url, "scoring.deadline=0.5", "evaluation.enabled=false", "output.checkpoint_every=100")
    update = made.trainer.update

    def interrupted(index):
        if index == 2:
            process.kill()
            process.wait()
        return update(index)

    made.trainer.update = interrupted
    with pytest.raises(
        Fault, match=rf"update 3: samples without a score, {url}: 4 of 4 \(.*ConnectError.*saved after update 2"
    ):
        made.run()
    made.folder.close()
    (kept,) = checkpoints(tmp_path / "run")
    assert saved_state(kept).update == 2
    assert os.path.getsize(tmp_path / "run" / "metrics.jsonl") > 0
