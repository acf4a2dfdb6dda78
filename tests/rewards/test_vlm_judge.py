"""A judge behind an endpoint: probabilities, words, and answers that are neither."""

import base64
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign import config
from diffalign.rewards import remote
from diffalign.rewards.load import load
from diffalign.types import Fault, Media, Prompts, UserError
from reward_models.vlm_judge import probability
from tests.rewards.test_remote import Server


def answer(text, **likely):
    found = {"choices": [{"message": {"content": text}}]}
    if likely:
        tokens = [{"token": token, "logprob": math.log(p)} for token, p in likely.items()]
        found["choices"][0]["logprobs"] = {"content": [{"top_logprobs": tokens}]}
    return found


def test_the_score_is_the_share_of_yes():
    assert probability(answer("Yes", Yes=0.6, No=0.2, Maybe=0.2)) == pytest.approx(0.75)
    assert probability(answer("no", **{" yes": 0.1, "Yes": 0.2, "NO": 0.3})) == pytest.approx(0.5)
    assert probability(answer("Yes.")) == 1
    assert probability(answer("no")) == 0
    assert math.isnan(probability(answer("I cannot tell")))
    assert math.isnan(probability(answer("", Perhaps=1.0)))
    assert math.isnan(probability(answer(None)))


@pytest.mark.parametrize("strange", [{}, {"choices": []}, {"choices": [{}]}, [], 5, {"choices": [{"message": "x"}]}])
def test_what_is_no_completion_is_a_fault(strange):
    with pytest.raises(Fault, match="is no chat completion"):
        probability(strange)


def test_every_sample_is_asked_about_with_its_own_prompt_and_picture(monkeypatch):
    monkeypatch.setattr(remote, "PAUSE", 0.02)
    troubles = iter([(503, {})])

    def judge(body):
        trouble = next(troubles, None)
        if trouble:
            return trouble
        *pictures, text = body["messages"][0]["content"]
        (url,) = [picture["image_url"]["url"] for picture in pictures]
        shot = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))))
        bright = shot.mean() > 127
        wants = "bright" in text["text"]
        return 200, answer("x", Yes=0.9 if bright == wants else 0.1, No=0.1 if bright == wants else 0.9)

    monkeypatch.setenv("OPENAI_API_KEY", "key")
    server = Server(judge)
    place = server.url.replace("/score", "/v1#tiny")
    reward = load(f"vlm_judge@{place}")
    pixels = torch.tensor([0.9, 0.1, 0.9])[:, None, None, None, None].expand(3, 1, 3, 8, 8)
    keys = np.arange(3)
    found = reward(Media(pixels), Prompts(["bright", "bright", "dark"], keys, keys, keys, [{}] * 3))
    assert found == pytest.approx([0.9, 0.1, 0.1])
    assert server.bodies[0][1] == "Bearer key"
    assert {body["model"] for body, _ in server.bodies} == {"tiny"}
    server.close()


def test_a_dead_judge_gives_no_score():
    reward = load("vlm_judge@http://127.0.0.1:1/v1#m")
    reward._client.deadline = 0.2
    keys = np.arange(2)
    found = reward(Media(torch.rand(2, 1, 3, 8, 8)), Prompts(["a", "b"], keys, keys, keys, [{}] * 2))
    assert np.isnan(found).all()
    assert "ConnectError" in reward.said


def test_its_place_is_an_address_with_a_model():
    assert config.load("flow_grpo/shapes-sd3", ['rewards={"vlm_judge@http://localhost:8000/v1#m": 1.0}'])
    for name in ("vlm_judge", "vlm_judge@http://localhost:8000/v1", "vlm_judge@nowhere"):
        with pytest.raises(UserError, match="allowed is vlm_judge@http://HOST:PORT/v1#MODEL"):
            load(name)
