"""Servers that answer anything, or never end; rewards that do what they like; requests of every kind."""

import base64
import gzip
import io
import json
import os
import random
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image

from diffalign.errors import Fault, RewardFailed, UserError
from diffalign.rewards import catalog, isolated
from diffalign.rewards.load import load
from diffalign.rewards.remote import Remote
from diffalign.rewards.scorer import Scorer
from diffalign.rewards.server import Served
from diffalign.rewards.wire import packed, scores_of
from diffalign.runtime import json_text
from diffalign.types import Media
from tests.kit.generators import COUNTS, PLAIN, broken, promised, tried
from tests.rewards.test_remote import Server, names, samples, served


class Slow:
    """A server that answers by `send(connection)` whatever it is asked."""

    def __init__(self, send):
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/score"
        self.send = send
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self.answer, args=(connection,), daemon=True).start()

    def answer(self, connection):
        try:
            connection.recv(65536)
            self.send(connection)
            connection.close()
        except OSError:
            pass


def dripping(text):
    def send(connection):
        for byte in text:
            connection.sendall(bytes([byte]))
            time.sleep(0.2)

    return send


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 400\r\n\r\n"


@pytest.mark.parametrize(
    "send",
    [
        dripping(HEAD * 10),
        lambda c: (c.sendall(HEAD), dripping(b" " * 400)(c)),
        lambda c: time.sleep(100),
        lambda c: (
            c.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
            dripping(b"1\r\n \r\n" * 100)(c),
        ),
    ],
    ids=["head", "body", "silence", "chunks"],
)
def test_a_deadline_holds_whatever_trickles_in(send):
    server = Slow(send)
    reward = Remote("r", [server.url], deadline=1.5, batch=2)
    started = time.monotonic()
    assert np.isnan(reward(*samples(4))).all()
    assert 1.4 < time.monotonic() - started < 3.5
    assert "deadline" in reward.said or "timed out" in reward.said
    server.socket.close()


def test_an_encoded_reply_is_not_unpacked():
    body = gzip.compress(b" " * 2**28)
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    server = Slow(lambda c: c.sendall(head + body))
    with pytest.raises(Fault, match="answered encoded as 'gzip'"):
        Remote("r", [server.url], deadline=20)(*samples(2))


def test_an_address_that_leads_on_is_refused_before_anything_is_sampled():
    server = Slow(lambda c: c.sendall(b"HTTP/1.1 307 x\r\nLocation: /score\r\nContent-Length: 0\r\n\r\n"))
    with pytest.raises(UserError, match=r"leads on to /score .307.; give the address"):
        Remote("r", [server.url], deadline=5).greet()


def test_a_server_that_wants_less_at_a_time_gets_it():
    server = Server(lambda body: names(body) if len(body["prompts"]) <= 3 else (413, {"error": "send fewer samples"}))
    assert Remote("r", [server.url], deadline=10, batch=16)(*samples(10)) == list(range(10))
    server.close()
    server = Server(lambda body: (413, {}))
    with pytest.raises(Fault, match="refused .413."):
        Remote("r", [server.url], deadline=10)(*samples(4))
    server.close()


@COUNTS
def test_any_reply_is_scores_or_a_fault(count):
    text = json.dumps({"name": "r", "version": "1", "scores": [0.5, None, 3]})
    texts = broken(text) | st.builds(lambda value: json.dumps({"scores": value}), PLAIN) | st.text()
    hard = st.sampled_from(['{"scores": [0.5, null, 1e999]}', '{"scores": [0.5, null, true]}', "[" * 10**5, '"111"'])

    def check(reply):
        def read():
            try:
                return scores_of(json_text.parse(reply.encode("utf-8", "surrogatepass")), 3)
            except ValueError as error:
                raise Fault(f"expected JSON: {error}") from error

        scores = promised(read)
        assert scores is None or (len(scores) == 3 and all(type(score) is float for score in scores))
        if scores is not None:  # what a plain reading of the text says, and nothing else
            given = json.loads(reply)["scores"]
            assert all(
                (g is None and s != s) or (type(g) in (int, float) and s == g)
                for g, s in zip(given, scores, strict=True)
            )

    tried(texts | hard, count, check)


@COUNTS
def test_any_request_is_answered_in_a_line(count):
    served = Served("jpeg_compressibility", 2**20)
    media, prompts = samples(2)
    whole = {"prompts": prompts.text, "metadata": prompts.metadata, "fps": 8, "media": packed(media)}
    bodies = broken(json.dumps(whole)).map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary()
    values = st.tuples(st.sampled_from([*whole, "x"]), PLAIN).map(
        lambda kv: json.dumps({**whole, kv[0]: kv[1]}).encode()
    )

    def check(body):
        started = time.monotonic()
        status, content = served.answer(body)
        assert status in (200, 413, 422), content
        assert status == 200 or len(content["error"]) < 500
        assert time.monotonic() - started < 10

    tried(bodies | values, count, check)


# -- rewards that do what they like

CALLABLES = """
from functools import partial
import functools as ft
from bright import f as imported
def g(m, p, k): return k * m.pixels.mean((1, 2, 3, 4))
part = partial(g, k=2.0)
lam = lambda m, p: g(m, p, 1.0)
class R:
    def __call__(self, m, p): return g(m, p, 1.0)
inst = R()
table = {"a": lam}
from_table = table["a"]
try:
    import a_fast_package
except ImportError:
    def slow(m, p): return g(m, p, 1.0)
if True:
    for each in (lam,): in_loop = each
with open(__file__): in_with = lam
annotated: object = lam
bound = inst.__call__
"""


def test_whatever_can_be_called_is_a_reward(tmp_path):
    (tmp_path / "bright.py").write_text("def f(media, prompts):\n    return media.pixels.mean((1, 2, 3, 4))\n")
    (tmp_path / "r.py").write_text(CALLABLES)
    media, prompts = samples(3)
    mean = media.pixels.mean((1, 2, 3, 4))
    for name in (
        "part",
        "lam",
        "R",
        "inst",
        "slow",
        "imported",
        "from_table",
        "in_loop",
        "in_with",
        "annotated",
        "bound",
    ):
        place = f"{tmp_path}/r.py:{name}"
        assert not catalog.problems(place, [])[0], name
        assert torch.equal(torch.as_tensor(load(place)(media, prompts)), mean * (2 if name == "part" else 1)), name
    assert "defines no function 'nothing'" in catalog.problems(f"{tmp_path}/r.py:nothing", [])[0][0]
    with pytest.raises(UserError, match="'table' in .* is .*, allowed is what can be called"):
        load(f"{tmp_path}/r.py:table")


def test_two_files_of_one_name_and_their_helpers_are_kept_apart(tmp_path):
    for folder, number in (("a", 1.0), ("b", 2.0)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "helper.py").write_text(f"N = {number}\n")
        code = "import helper\ndef f(m, p):\n    import helper as again\n    return [helper.N] * len(p)\n"
        (tmp_path / folder / "r.py").write_text(code)
    a, b = (load(f"{tmp_path}/{folder}/r.py:f") for folder in "ab")
    media, prompts = samples(1)
    assert (a(media, prompts), b(media, prompts)) == ([1.0], [2.0])


def test_what_a_reward_does_to_its_samples_and_to_the_process_is_undone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "away").mkdir()

    def wild(media, prompts):
        os.chdir("away")
        value = media.pixels.mul_(0.5).mean((1, 2, 3, 4))
        prompts.metadata[0]["k"] = "spoilt"
        prompts.text[0] = "spoilt"
        prompts.group[:] = 7
        return value + torch.rand(1) + np.random.rand() + random.random()

    def mean(media, prompts):
        assert prompts.text[0] == "0"
        assert prompts.metadata[0] == {"k": 0}
        return media.pixels.mean((1, 2, 3, 4))

    media, prompts = samples(3)
    before = media.pixels.clone()
    torch.manual_seed(5)
    state, numpys, pythons = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    scores = [Scorer({"wild": wild, "mean": mean}).scores(media, prompts).by_name for _ in range(2)]
    assert np.array_equal(scores[0]["wild"], scores[1]["wild"])  # its draws belong to the samples
    assert np.allclose(scores[0]["mean"], before.mean((1, 2, 3, 4)))
    assert torch.equal(media.pixels, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpys)
    assert random.getstate() == pythons
    assert os.getcwd() == str(tmp_path)
    assert prompts.metadata[0] == {"k": 0}
    assert prompts.group.tolist() == [0, 1, 2]
    seen: dict = {}
    shown = Media(media.pixels.clone().requires_grad_())
    Scorer({"half": lambda m, p: m.pixels.mul(1).mul_(0.5).mean((1, 2, 3, 4)), "mean": mean}).pathwise(prompts, seen)(
        shown
    )
    assert torch.equal(shown.pixels.detach(), before)


def test_a_failure_says_the_line_in_the_users_file_and_what_may_pass_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr("diffalign.rewards.scorer.PAUSES", (0.0, 0.0))
    (tmp_path / "r.py").write_text(
        "n = 0\ndef helper(d):\n    return d['weight']\ndef f(m, p):\n    return [helper(x) for x in [{}] * len(p)]\n"
        "def flaky(m, p):\n    global n; n += 1\n    if n < 3: raise ConnectionError('timed out')\n    return [1.0] * len(p)\n"
        "def down(m, p):\n    global n; n += 1\n    raise TimeoutError('no answer')\n"
    )
    media, prompts = samples(2)
    with pytest.raises(RewardFailed, match=rf"reward f: KeyError: 'weight' \({tmp_path}/r.py line 3\)"):
        Scorer({"f": load(f"{tmp_path}/r.py:f")}).scores(media, prompts)
    assert Scorer({"r": load(f"{tmp_path}/r.py:flaky")}).scores(media, prompts).total.tolist() == [1, 1]
    with pytest.raises(RewardFailed, match="TimeoutError: no answer"):
        Scorer({"r": load(f"{tmp_path}/r.py:down")}).scores(media, prompts)
    assert isolated.passing(ConnectionResetError())
    assert not isolated.passing(FileNotFoundError())
    assert not isolated.passing(KeyError())


def memory(pid, what):
    """MiB of a process by the kernel's count: VmRSS now, VmHWM at most so far."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1]) / 1024


def flat(side):
    """A small PNG file of a large picture."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.slow
def test_two_dozen_hostile_requests_at_once_take_less_than_a_gigabyte():
    process, url = served(0, "jpeg_compressibility")
    try:
        one = {"prompts": ["a"], "media": {"format": "png", "data": [[flat(64)]]}}
        assert httpx.post(url, json=one, timeout=60).status_code == 200
        idle = memory(process.pid, "VmRSS")
        bodies = [
            json.dumps({"prompts": ["a"], "media": {"format": "png", "data": [[flat(side)]]}}) for side in (8192, 3000)
        ]
        bodies += [json.dumps({"prompts": ["a"] * 12, "media": {"format": "png", "data": [[flat(3000)]] * 12}})]
        raw = base64.b64encode(bytes(45 * 2**20)).decode()
        bodies += [
            json.dumps({"prompts": ["a"], "media": {"format": "raw", "shape": [1, 15, 1024, 1024, 3], "data": raw}})
        ]
        with ThreadPoolExecutor(24) as pool:
            answers = list(
                pool.map(lambda k: httpx.post(url, content=bodies[k % 4], timeout=300).status_code, range(24))
            )
        assert set(answers) <= {200, 413, 503}
        peak = memory(process.pid, "VmHWM")
        print(f"idle {idle:.0f} MiB, peak {peak:.0f} MiB, answers {sorted(answers)}")
        assert peak - idle < 1024
        assert httpx.post(url, json=one, timeout=60).status_code == 200
    finally:
        process.kill()


WILD = """
import sys, torch
class Mute(Exception):
    def __str__(self): raise RuntimeError("no str")
class leaves:
    def __init__(self): raise SystemExit(0)
class generator:
    def __init__(self): raise GeneratorExit
def ends(m, p): raise GeneratorExit
def mute(m, p): raise Mute
def big(m, p): return [10**400] * len(p)
"""


def test_whatever_is_raised_is_the_rewards_and_no_end_of_the_program(tmp_path):
    (tmp_path / "r.py").write_text(WILD)
    media, prompts = samples(2)
    for name in ("leaves", "generator"):
        with pytest.raises(UserError, match="cannot be created: (SystemExit|GeneratorExit)"):
            load(f"{tmp_path}/r.py:{name}")
    for name, said in (("ends", "GeneratorExit"), ("mute", "Mute"), ("big", "expected 2 numbers")):
        with pytest.raises(RewardFailed, match=said):
            Scorer({"r": load(f"{tmp_path}/r.py:{name}")}).scores(media, prompts)


def test_what_a_reward_switches_is_switched_back():
    def switches(media, prompts):
        torch.autocast("cpu").__enter__()
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        torch.set_grad_enabled(True)
        torch.set_num_threads(3)
        torch.use_deterministic_algorithms(True)
        torch.backends.mkldnn.enabled = False
        torch.nn.modules.module.register_module_forward_hook(lambda m, args, out: out * 0)
        sys.setrecursionlimit(5000)
        return [0.0] * len(prompts)

    def state():
        hooks = torch.nn.modules.module._global_forward_hooks
        return [getter() for getter, _ in isolated._SWITCHES] + [len(hooks)]

    before = state()
    Scorer({"r": switches}).scores(*samples(2))
    assert state() == before
    assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).abs().sum() > 0
