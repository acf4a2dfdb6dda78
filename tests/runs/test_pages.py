"""The page of a run and the server of pages: they say what the folder's files say, wherever it is, and are in no run's way."""

import base64
import json
import re
import shutil
import threading
import urllib.error
import urllib.request

import filelock
import numpy as np
import pytest

from diffalign import config as configs
from diffalign.config.limits import GuardConfig
from diffalign.errors import UserError
from diffalign.evaluation.results import Summary
from diffalign.runs.events import Drawn, Ended, Evaluated, Updated
from diffalign.runs.folder import LOCK, RunFolder
from diffalign.runs.guards import Guards, alarms
from diffalign.runs.logs import read_rows
from diffalign.runs.session import train
from diffalign.runs.watching import gallery, live, page, server
from diffalign.runs.watching.reading import read
from diffalign.runs.watching.writer import PageWriter
from diffalign.runtime import keys
from diffalign.runtime.serving import listening
from diffalign.types import Update
from tests.kit.commands import diffalign
from tests.kit.helpers import SMALL

NAME = "flow_grpo/shapes-sd3"
OWN = [*SMALL, "rule.window=null", "updates=3", "output.sample_every=1", "evaluation.every=2", "evaluation.prompts=8"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of three updates."""
    place = tmp_path_factory.mktemp("pages") / "runs" / "one"
    train(configs.load(NAME, [*OWN, f"run_dir={place}"]), quiet=True)
    return place


@pytest.fixture
def copied(run, tmp_path):
    return shutil.copytree(run, tmp_path / "runs" / "moved")


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<(script|style).*?</\1>|<[^>]+>", " ", html, flags=re.S))


def test_a_run_leaves_its_page_and_a_copy_elsewhere_gives_the_same(run, copied):
    written = (run / "index.html").read_text()
    assert page.render(read(copied)) == written
    rows = read_rows(run)
    last = [row for row in rows if "eval/n" in row][-1]
    said = text_of(written)
    assert "3 of 3" in said and "finished" in said and "diffalign watch" not in said
    assert f"{last['eval/shapes_geneval']:.3f} after 3 updates" in said or "95 %" in said
    for row in rows:
        if "eval/n" in row:
            assert f"{row['eval/shapes_geneval']:.3f}" in said
    mean = np.mean([row["reward/total"] for row in rows if "reward/total" in row])
    assert f"training reward, mean of 3 {mean:.3f}" in said
    assert re.findall(r'data-moments="([^"]*)"', written) == ["1 2 3"]
    pictures = np.load(run / "samples" / "update_000003.npz")["images"]
    assert written.count("<img") == len(pictures) * 4  # before, and three moments
    assert "updates 140 3" in said and "sampler.steps 10 3" in said, "what differs from the preset"
    assert f"diffalign export {run} --out one.safetensors" in said


def test_the_pages_command_to_go_on_is_one(run, copied):
    """It was trained by a preset's name; its own config takes it up."""
    settings = (copied / "config.yaml").read_text().replace(str(run), str(copied))
    (copied / "config.yaml").write_text(settings)
    (command,) = [command for what, command in page.commands(read(copied)) if "train on" in what]
    program, verb, *words = command.split()
    assert words == [str(copied / "config.yaml"), "updates=6"]
    train(configs.load(words[0], ["updates=4"]), quiet=True)
    assert read(copied).done == 4


def test_an_unfinished_run_says_how_far_it_is(copied):
    shutil.rmtree(copied / "adapter")
    lines = (copied / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["update"] <= 2]
    (copied / "metrics.jsonl").write_text("".join(kept))
    record = read(copied)
    seconds = [row["seconds/total"] for row in record.updates]
    assert (record.finished, record.done, record.total) == (False, 2, 3)
    assert record.left == f"{np.mean(seconds):.2f} s/update, {np.mean(seconds):.1f} s left"
    said = text_of(page.render(record))
    assert "2 of 3" in said and "not finished" in said and "Go on, where it has stopped" in said
    (copied / "samples" / "update_000001.npz").write_bytes(b"no")
    (copied / "evaluation" / "update_000002.json").write_text("{}")
    said = text_of(page.render(read(copied)))
    assert "update_000001.npz: damaged" in said and "update_000002.json: damaged" in said


def test_budgets_say_how_many_updates_there_will_be(copied):
    shutil.rmtree(copied / "adapter")
    each = read_rows(copied)[-1]["spent/rows"] / 3  # as the run itself counted them
    record = read(copied)
    for budget, total in (({"rows": 10 * each + 1}, 10), ({"reward_calls": 4 * 7}, 7), ({"seconds": 1e9}, 50)):
        settings = {**record.settings, "updates": 50, "budget": budget}
        assert type(record)(copied, settings, record.rows).total == total


def test_alarms_read_from_a_log_are_those_that_the_run_said():
    diversity = [0.232, 0.257, 0.077, 0.075, 0.075, 0.076, 0.111, 0.131]
    said, rows = [], []
    guards = Guards(["a"], GuardConfig(last=2), said.append)
    for number, value in enumerate(diversity, 1):
        row = {keys.RATE: 1e-3, keys.DIVERSITY: value, "groups_flat": float(number > 4)}
        guards.updated(Updated(number, 8, Update(), row))
        rows.append({"update": number, **row})
        if number in (5, 6):
            gains = {"eval/a": 0.5, "eval/a_gain": 0.2, "eval/a_gain_lo": 0.1, "eval/a_gain_hi": 0.3, "eval/n": 8.0}
            gains |= {"eval/b": 0.5, "eval/b_gain": -0.2, "eval/b_gain_lo": -0.3, "eval/b_gain_hi": -0.1}
            gains |= {"eval/b_since_best": -0.2, "eval/b_since_best_lo": -0.3, "eval/b_since_best_hi": -0.1}
            guards.drawn(Drawn(number, np.zeros((1, 2, 2, 3), np.uint8), ["a"], 0.4))
            guards.evaluated(Evaluated(number, Summary.of_row(gains)))
            rows += [{"update": number, keys.DRIFT: 0.4}, {"update": number, **gains}]
    found = alarms(rows, ["a"], GuardConfig(last=2))
    assert [f"update {alarm.update}: {alarm.line}" for alarm in found] == said
    assert {alarm.name: alarm.update for alarm in found} == guards.raised
    assert len(found) == 4


def test_a_fault_of_the_page_is_said_once_and_ends_nothing(run, copied):
    said = []
    writer = PageWriter(RunFolder(copied), said.append)
    (copied / "config.yaml").write_text("rule: {")
    writer.drawn(Drawn(3, np.zeros((1, 2, 2, 3), np.uint8), ["a"]))
    writer.ended(Ended(3, Summary(), 1.0))
    assert len(said) == 1 and "index.html was not written (UserError" in said[0] and said[0].endswith("the run goes on")
    assert (copied / "index.html").read_text() == (run / "index.html").read_text(), "the one before stays"


def test_runs_under_a_folder_are_found_and_methods_of_comparisons_are_none(run, tmp_path):
    for name in ("units/nft/seed_0", "a/b/c/d", "x/b/c/d/e"):
        (tmp_path / name).mkdir(parents=True)
        shutil.copy(run / "config.yaml", tmp_path / name)
        (tmp_path / name / "metrics.jsonl").write_text("")
    shutil.copy(run / "config.yaml", tmp_path / "units" / "nft")
    assert list(gallery.runs(tmp_path)) == ["a/b/c/d", "units/nft/seed_0"]
    assert list(gallery.runs(tmp_path / "a/b/c/d")) == ["."]


def test_whether_a_run_goes_on_is_told_without_its_lock(copied):
    record = read(copied)
    assert live.state(record) == "finished"
    shutil.rmtree(copied / "adapter")
    (copied / LOCK).touch()
    newest = max(live.stamp(copied)[::2]) / 1e9
    assert live.state(read(copied), newest + 5) == "running", "it wrote a moment ago"
    assert live.state(read(copied), newest + 7200) == "stopped, quiet for 2.0 h"
    if live.LOCKS.is_file():
        with filelock.FileLock(copied / LOCK):
            assert live.state(read(copied), newest + 7200) == "running"
            assert read(copied).done == 3
        assert not live.locked(copied / LOCK)


@pytest.fixture
def served(run):
    """Addresses of a server without a token, and of one with."""
    folder, found = run.parent, []
    with listening("127.0.0.1", 0) as one, listening("127.0.0.1", 0) as two:
        for (bound, address), token in ((one, None), (two, "secret")):
            made = server.Server(server.Watched(folder), bound, token)
            threading.Thread(target=made.serve_forever, daemon=True).start()
            found.append((made, address))
        yield [address for _, address in found]
        for made, _ in found:
            made.shutdown()


def get(address: str, method: str = "GET", **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(address, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_server_lists_runs_and_gives_pages_and_versions_and_nothing_else(run, served):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    address = served[0]
    status, listed = get(f"{address}/")
    assert status == 200 and 'href="run/one/"' in listed and "3 of 3" in listed
    status, own = get(f"{address}/run/one/")
    assert status == 200 and "finished" in own and 'href="../../"' in own
    version = get(f"{address}/run/one/?version")[1]
    assert f'data-version="{version}"' in own and len(version) == 16
    assert get(f"{address}/?version")[1] in listed
    for path in ("/run/two/", "/run/%2e%2e/one/", "/run/../one/", "/run/one/config.yaml", "/etc/passwd", "/report"):
        assert get(address + path)[0] == 404, path
    assert get(f"{address}/", "POST")[0] == 501
    assert get(f"{address}/", Host="evil.example")[0] == 421, "a page elsewhere may not read it through the browser"
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_token_is_asked_for_as_browsers_and_programs_give_it(served):
    address = f"{served[1]}/"
    assert get(address)[0] == 401
    assert get(address, Authorization="Bearer wrong")[0] == 401
    assert get(address, Authorization="Basic !!")[0] == 401
    assert get(address, Authorization="Bearer secret")[0] == 200
    assert get(address, Authorization="Basic " + base64.b64encode(b"me:secret").decode())[0] == 200


def test_a_version_changes_with_the_files(copied):
    watched = server.Watched(copied.parent)
    before = watched.answer("/", True), watched.answer("/run/moved/", True)
    assert before == (watched.answer("/", True), watched.answer("/run/moved/", True))
    with (copied / "metrics.jsonl").open("a") as file:
        file.write('{"update": 4, "reward/total": 0.125, "seconds/total": 1.0}\n')
    assert not read(copied).finished, "its adapter is of three updates"
    assert watched.answer("/", True) != before[0] and watched.answer("/run/moved/", True) != before[1]
    (copied / "config.yaml").write_text("{")
    assert "config.yaml line 1: not YAML" in watched.answer("/", False)
    with pytest.raises(UserError, match=r"config.yaml line 1: not YAML"):
        watched.answer("/run/moved/", False)


@pytest.mark.slow
def test_mistakes_are_one_line(run, tmp_path):
    done = diffalign("watch", str(tmp_path))
    assert done.returncode == 2 and done.stderr.startswith(f"diffalign: watch: {tmp_path} holds no run; allowed is")
    with pytest.raises(UserError, match="--host: got 0.0.0.0, which others can reach; set a token"):
        server.serve(run, "0.0.0.0", 0, None)
    with listening("127.0.0.1", 0) as (bound, address):
        bound.listen()
        port = int(address.rpartition(":")[2])
        with pytest.raises(UserError, match=f"--port: 127.0.0.1:{port}: Address already in use; name another"):
            server.serve(run, "127.0.0.1", port, None)
