"""The servers in `examples/servers`, each run as a user runs it, with stand-ins for the packages they serve."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from diffalign.errors import Fault
from diffalign.rewards.load import load
from diffalign.rewards.wire import packed
from diffalign.types import Media, Prompts
from tests.kit import ROOT

SERVERS = ROOT / "examples" / "servers"
STANDINS = {
    # the two arguments in the other order, as in one of its versions; mu is the brightness
    "hpsv3.py": (
        "from PIL import Image\nimport numpy as np\n"
        "class HPSv3RewardInferencer:\n"
        "    def __init__(self, config_path=None, checkpoint_path=None, device='cuda', differentiable=False):\n"
        "        assert device == 'cpu'\n"
        "    def reward(self, image_paths, prompts):\n"
        "        return [[np.asarray(Image.open(p)).mean() / 255 + len(t), 0.1] for p, t in zip(image_paths, prompts)]\n"
    ),
    "inference.py": (
        "import imageio.v2 as imageio\n"
        "class VideoVLMRewardInference:\n"
        "    def __init__(self, load_from_pretrained, load_from_pretrained_step=-1, device='cuda', dtype=None):\n"
        "        self.place = load_from_pretrained\n"
        "    def reward(self, video_paths, prompts, fps=None, num_frames=None, max_pixels=None, use_norm=True):\n"
        "        assert use_norm and self.place == 'weights' and all(isinstance(p, str) for p in video_paths)\n"
        "        found = []\n"
        "        for path, prompt in zip(video_paths, prompts):\n"
        "            video = imageio.mimread(path)\n"
        "            vq = sum(float(f.mean()) for f in video) / len(video) / 255\n"
        "            found.append({'VQ': vq, 'MQ': float(len(video)), 'TA': float(len(prompt))})\n"
        "            found[-1]['Overall'] = sum(found[-1].values())\n"
        "        return found\n"
    ),
    "mmdet.py": "",
    "evaluate_images.py": (
        "from PIL import Image\nimport numpy as np\n"
        "def load_models(args):\n"
        "    assert args.model_path == 'MODELS' and args.options == {} and args.model_config.endswith('coco.py')\n"
        "    return 'detector', ('clip', 'transform', 'tokenizer'), ['bench']\n"
        "def evaluate_image(path, metadata):\n"
        "    assert (object_detector, clip_model, tokenizer, classnames) == ('detector', 'clip', 'tokenizer', ['bench'])\n"
        "    assert (THRESHOLD, COUNTING_THRESHOLD, MAX_OBJECTS, NMS_THRESHOLD, POSITION_THRESHOLD) == (0.3, 0.9, 16, 1.0, 0.1)\n"
        "    bright = np.asarray(Image.open(path)).mean() > 127\n"
        "    return {'correct': bright == (metadata['include'][0]['class'] == 'bright')}\n"
    ),
}


def test_every_server_that_ships_is_run_by_a_test():
    """And none has the name of a module that it imports: beside the script it would be found first."""
    for script in SERVERS.glob("serve_*.py"):
        assert f'served("{script.stem.removeprefix("serve_")}"' in Path(__file__).read_text(), script.name
    assert {path.name for path in SERVERS.glob("*.py")} - {path.name for path in SERVERS.glob("serve_*.py")} == {
        "standalone.py"
    }


@pytest.fixture(scope="module")
def standins(tmp_path_factory):
    place = tmp_path_factory.mktemp("packages")
    (place / "evaluation").mkdir()
    for name, text in STANDINS.items():
        (place / ("evaluation" if name == "evaluate_images.py" else "") / name).write_text(text)
    return place


@pytest.fixture
def served(standins, tmp_path):
    """Starts a server and gives its address."""
    begun = []

    def start(name, *options, **environment):
        shipped = SERVERS / f"serve_{name}.py"
        script = shipped if shipped.exists() else tmp_path / f"{name}.py"
        given = {
            **os.environ,
            "PYTHONPATH": str(standins) if shipped.exists() else os.pathsep.join([str(SERVERS), str(standins)]),
            "VIDEOALIGN": str(standins),
            "GENEVAL": str(standins),
            **environment,
        }
        command = [sys.executable, str(script), "--port", "0", *options]
        process = subprocess.Popen(command, env=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        begun.append(process)
        line = process.stdout.readline()
        assert " at http://127.0.0.1:" in line, process.stderr.read()
        return line.split(" at ")[1].strip()

    yield start
    for process in begun:
        process.kill()
        process.communicate()


def given(levels=(0.9, 0.1, 0.6), frames=1, size=16):
    pixels = torch.tensor(levels)[:, None, None, None, None].expand(len(levels), frames, 3, size, size)
    keys = np.arange(len(levels))
    texts = ["x" * (k + 1) for k in range(len(levels))]
    metadata = [{"tag": "single_object", "include": [{"class": "bright", "count": 1}]} for _ in levels]
    return Media(torch.round(pixels * 255) / 255, 8.0), Prompts(texts, keys, keys, keys, metadata)


def test_hpsv3_gives_every_sample_its_own_mean(served):
    found = load(served("hpsv3", HPSV3_DEVICE="cpu"), batch=2)(*given())
    assert found == pytest.approx([1.9, 2.1, 3.6], abs=0.005)


@pytest.mark.parametrize(("kind", "expected"), [("Overall", [6.9, 7.1]), ("MQ", [5, 5]), ("TA", [1, 2])])
def test_videoalign_is_given_files_of_whole_videos(served, kind, expected):
    url = served("videoalign", VIDEOALIGN_CHECKPOINTS="weights", VIDEOALIGN_SCORE=kind)
    found = load(url)(*given((0.9, 0.1), frames=5, size=32))
    assert found == pytest.approx(expected, abs=0.03)  # mp4 loses a little


def test_genevals_own_code_judges(served):
    media, prompts = given()
    url = served("geneval", GENEVAL_MODELS="MODELS")
    assert load(url)(media, prompts) == [1.0, 0.0, 1.0]
    for metadata in prompts.metadata:
        del metadata["tag"]
    with pytest.raises(Fault, match="refused .422.: .*metadata: tag is needed in every object"):
        load(url)(media, prompts)


MINE = """
from standalone import serve
def score(frames, prompts, metadata, fps):
    if "fail" in prompts:
        raise OSError("no memory")
    if "few" in prompts:
        return [1.0]
    return [None if p == "none" else float("nan") if p == "nan" else sum(f.getpixel((0, 0))[0] for f in s) for s, p in zip(frames, prompts)]
serve(score, name="mine", version="1")
"""


@pytest.fixture
def mine(served, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    return served("mine", "--max-mib", "1", DIFFALIGN_REWARD_TOKEN="secret")


def test_any_function_in_any_environment(mine, monkeypatch):
    monkeypatch.setenv("DIFFALIGN_REWARD_TOKEN", "secret")
    media, prompts = given((0.2, 0.4, 0.6), frames=2)
    prompts.text[:] = ["a", "none", "nan"]
    first, *others = load(mine)(media, prompts)
    assert first == 2 * 51
    assert np.isnan(others).all()
    raw = {"prompts": ["a"], "media": packed(Media(media.pixels[:1]), "raw")}
    told = {"Authorization": "Bearer secret"}
    assert httpx.post(mine, json=raw, headers=told).json()["scores"] == [2 * 51]
    assert httpx.get(mine.replace("score", "health")).json() == {"name": "mine", "version": "1", "about": ""}


@pytest.mark.parametrize(
    ("change", "status", "problem"),
    [
        ({"prompts": "a"}, 422, "prompts: expected a list of texts"),
        ({"metadata": [1]}, 422, "metadata: expected 1 objects"),
        ({"fps": "fast"}, 422, "fps: got 'fast', allowed are numbers above 0"),
        ({"media": {"format": "pickle"}}, 422, "media: expected an object with format png or raw"),
        ({"media": {"format": "png", "data": [["!"]]}}, 422, "media.data: not base64"),
        ({"media": {"format": "png", "data": [["AAAA"]]}}, 422, "media.data: not a PNG file"),
        ({"media": {"format": "raw", "shape": [1, 1, 2, 2, 3], "data": "AAAA"}}, 422, "does not fit 3 bytes"),
        ({"prompts": ["fail"]}, 500, "OSError: no memory"),
        ({"prompts": ["few", "b"]}, 422, "media: 1 samples for 2 prompts"),
        ({"extra": "x" * 2**20}, 413, "more than 1048576 bytes"),
    ],
)
def test_bad_requests_are_told_what_is_wrong(mine, change, status, problem):
    body = {"prompts": ["a"], "media": packed(given((0.5,))[0])} | change
    answer = httpx.post(mine, json=body, headers={"Authorization": "Bearer secret"})
    assert (answer.status_code, problem in answer.json()["error"]) == (status, True), answer.text
    assert httpx.post(mine, json=body).status_code == 401
    assert httpx.get(mine).status_code == 404


def test_strange_lengths_and_ports_in_use_are_told(mine, tmp_path):
    host, port = mine.split("/")[2].split(":")
    with socket.create_connection((host, int(port)), timeout=10) as line:
        line.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\nContent-Length: \xb2\r\n\r\n")
        assert b"411" in line.recv(1000)
    (tmp_path / "mine.py").write_text(MINE)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "mine.py"), "--port", port],
        env={**os.environ, "PYTHONPATH": str(SERVERS)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert f"--port: 127.0.0.1:{port}: [Errno 98] Address already in use; name another" in done.stderr


def test_a_huge_picture_in_a_small_file_is_refused(mine):
    import base64
    import io

    from PIL import Image

    for side, count, problem in ((8_500, 4, "more than 268435456 pixels"), (20_000, 1, "not a PNG file")):
        file = io.BytesIO()
        Image.new("L", (side, side)).save(file, "PNG")
        shots = [base64.b64encode(file.getvalue()).decode()] * count
        body = {"prompts": ["a"], "media": {"format": "png", "data": [shots]}}
        answer = httpx.post(mine, json=body, headers={"Authorization": "Bearer secret"})
        assert (answer.status_code, problem in answer.json()["error"]) == (422, True), answer.text


def test_others_can_reach_it_only_with_a_token(standins, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    environment = {**os.environ, "PYTHONPATH": str(SERVERS)}
    environment.pop("DIFFALIGN_REWARD_TOKEN", None)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "mine.py"), "--host", "0.0.0.0"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "--host: got 0.0.0.0, which others can reach; set a token in DIFFALIGN_REWARD_TOKEN" in done.stderr
