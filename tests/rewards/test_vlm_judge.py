"""A judge behind an endpoint: probabilities, words, and answers that are neither."""

import base64
import io
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign import config
from diffalign.errors import Fault, UserError
from diffalign.rewards.load import load
from diffalign.runtime import http
from diffalign.types import Media, Prompts
from reward_models.vlm_judge import points, probability
from tests.rewards.test_remote import Server


def answer(text, **likely):
    found = {"choices": [{"message": {"content": text}}]}
    if likely:
        tokens = [{"token": token, "logprob": math.log(p)} for token, p in likely.items()]
        found["choices"][0]["logprobs"] = {"content": [{"top_logprobs": tokens}]}
    return found


def test_the_score_is_the_share_of_yes():
    assert probability(answer("Yes", Yes=0.6, No=0.2, Maybe=0.2)) == pytest.approx(0.75)
    assert probability(answer("no", **{" yes": 0.1, "Yes": 0.2, "NO": 0.3, "I": 0.4})) == pytest.approx(0.5)
    assert probability(answer("Yes.")) == 1
    assert probability(answer("no")) == 0
    assert math.isnan(probability(answer("I cannot tell")))
    assert math.isnan(probability(answer("", Perhaps=1.0)))
    assert math.isnan(probability(answer(None)))


def test_a_token_that_is_listed_under_two_spellings_counts_once():
    # "Yes", " Yes" and a special token may share an id: a tokenizer that decodes it in three ways lists it three times.
    assert probability(answer("Yes", **{"Yes": 0.6, " Yes": 0.6, "yes.": 0.6, "No": 0.4})) == pytest.approx(0.6)
    with pytest.raises(Fault, match="add up to more than 1"):
        probability(answer("Yes", **{"Yes": 0.6, " Yes": 0.55, "No": 0.1}))


def test_j30_what_the_list_leaves_out_may_be_a_twentieth():
    """Of the tokens that were not listed nobody knows which words they are."""
    assert probability(answer("Yes", Yes=0.6, No=0.36)) == pytest.approx(0.625)
    assert math.isnan(probability(answer("Yes", Yes=0.6, No=0.34)))
    assert math.isnan(probability(answer("Yes", Yes=0.3, No=0.1, I=0.3)))
    assert points(scored("4", "4", **{"3": 0.48, "4": 0.48})) == 3.5
    assert math.isnan(points(scored("4", "4", **{"3": 0.47, "4": 0.47})))


@pytest.mark.parametrize("strange", [{}, {"choices": []}, {"choices": [{}]}, [], 5, {"choices": [{"message": "x"}]}])
def test_what_is_no_completion_is_a_fault(strange):
    with pytest.raises(Fault, match="is no chat completion"):
        probability(strange)


def test_every_sample_is_asked_about_with_its_own_prompt_and_picture(monkeypatch):
    monkeypatch.setattr(http, "PAUSE", 0.02)
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
    fixed = {"temperature": 0, "seed": 0, "max_tokens": 1, "logprobs": True, "top_logprobs": 20}
    assert all(body | fixed == body for body, _ in server.bodies)
    server.close()


def scored(text, number=None, **likely):
    """An answer whose tokens are words; the one that is `number` could have been others."""
    found = answer(text)
    others = [{"token": token, "logprob": math.log(p)} for token, p in likely.items()]
    tokens = [
        {"token": word, "top_logprobs": others if word.strip() == number else []}
        for word in re.findall(r"\s*\S+", text)
    ]
    found["choices"][0]["logprobs"] = {"content": tokens}
    return found


def test_points_are_the_last_ones_given_or_their_mean_over_what_could_have_been():
    assert points(answer("Good colours. Final Score: 4")) == 4
    assert points(answer(" 4.5.")) == 4.5
    assert points(scored("4", "4", **{"3": 0.5, "4": 0.5})) == 3.5
    assert points(answer("Score: 2 for colour.\n**Final Score:** 3.7")) == 3.7
    told = {"3": 0.2, "4": 0.6, " 4": 0.1, "7": 0.05, "x": 0.05}
    assert points(scored("I think Final Score: 4", "4", **told)) == pytest.approx((3 * 0.2 + 4 * 0.7) / 0.9)
    assert points(scored("Final Score: 3.7", "3.7", **told)) == 3.7
    for nothing in ("no idea", "Final Score: 9", "Final Score: 0", "Final Score: none", ""):
        assert math.isnan(points(answer(nothing))), nothing


AXES = "Alignment Score (1-5): 2.5\nPhysics Score (1-5): 3.5\nStyle Score (1-5): 3"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (AXES, 3.0),
        ("Alignment Score (1-5): X\nPhysics Score (1-5): Y\nStyle Score (1-5): Z\n\n" + AXES, 3.0),
        (f"{AXES}\nFinal Score: 4.5", 4.5),
        (AXES.replace("3.5", "nan"), None),
        (AXES.replace("3.5", "35"), None),
        ("Score: 3 for colour.\nFinal Score: nan", None),
        ("Final Score (1-5): 4", 4.0),
        ("Final Score: 4/5. That score stands.", 4.0),
        ("Score: 2, and so the Final Score: 4 out of 5", 4.0),
        ("Final Score: 4/10", None),
        ("Final Score: 1 (bad) to 5 (excellent)", None),
        ("Final Score: 1-5", None),
        ('I give points from 1 (bad) to 5 (excellent). End with a line "Final Score: " and the points.', None),
        ('{"colour_score": 2, "final_score": 4}', 4.0),
        ('```json\n{"score": 3}\n```', 3.0),
        ('{"colour_score": 2, "final_sc', None),
    ],
)
def test_j30_an_answer_that_is_no_score_gives_none(text, expected):
    found = points(answer(text))
    assert math.isnan(found) if expected is None else found == expected


def test_j30_an_answer_that_was_cut_gives_none():
    cut = answer("Final Score: 4")
    assert points(cut) == 4
    cut["choices"][0]["finish_reason"] = "length"
    assert math.isnan(points(cut))


def test_points_are_asked_for_in_the_users_own_words(tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("Rate {prompt}! {keep these}")
    server = Server(lambda body: (200, answer("Final Score: 5" if "Rate bright!" in str(body) else "?")))
    reward = load(f"vlm_points@{server.url.replace('/score', '/v1#tiny')};{words}")
    keys = np.arange(2)
    found = reward(Media(torch.rand(2, 1, 3, 8, 8)), Prompts(["bright", "dark"], keys, keys, keys, [{}] * 2))
    assert found[0] == 1.0
    assert math.isnan(found[1])
    assert reward.said == "answered '?', which is no score"
    assert {body["model"] for body, _ in server.bodies} == {"tiny"}
    assert all("{keep these}" in str(body) for body, _ in server.bodies)
    server.close()
    words.write_text("Rate it")
    with pytest.raises(
        UserError, match=r"words.txt does not say where the prompt goes; allowed is a text with \{prompt\}"
    ):
        load(f"vlm_points@http://127.0.0.1:1/v1#m;{words}")


def seeing(body):
    """A judge that looks: is it red?"""
    *pictures, text = body["messages"][0]["content"]
    assert "a plain red picture" in text["text"] and text["text"] != "a plain red picture"
    shot = np.asarray(Image.open(io.BytesIO(base64.b64decode(pictures[0]["image_url"]["url"].split(",")[1]))))
    red = shot[0, 0, 0] > shot[0, 0, 2]
    return 200, answer("Yes" if red else "No", Yes=0.9 if red else 0.1, No=0.1 if red else 0.9)


def greeted(reply, got, model="tiny", judge="vlm_judge"):
    """What is said at a greeting, and how often a question was asked."""
    said, server = [], Server(reply, got=got)
    try:
        reward = load(f"{judge}@{server.url.replace('/score', f'/v1#{model}')}")
        reward._client.deadline = 5.0
        reward.greet(said.append)
        return said, len(server.bodies)
    finally:
        server.close()


def lists(*names):
    return lambda path: (200, {"data": [{"id": name} for name in names]}) if path == "/v1/models" else (404, {})


def test_a_judge_is_asked_for_its_models_and_about_two_pictures_before_anything_is_begun():
    assert greeted(seeing, lists("large", "tiny")) == ([], 2)
    assert greeted(seeing, lists("models/tiny")) == ([], 2)
    with pytest.raises(
        UserError, match=r"rewards: vlm_judge@http.*#tiny: got the model 'tiny', http.*/v1/models lists large, b$"
    ):
        greeted(seeing, lists("large", "b"))
    with pytest.raises(UserError, match=r"lists m0, m1, .*, m11 and 8 more$"):
        greeted(seeing, lists(*(f"m{k}" for k in range(20))))


@pytest.mark.parametrize("got", [(404, {}), (200, {"models": []}), (200, b"<html>"), (403, {}), (500, {})])
def test_a_server_that_lists_no_models_is_told_of_once_and_taken(got):
    (said,), asked = greeted(seeing, lambda path: got)
    assert asked == 2
    assert f"/v1/models lists no models ({got[0]}), so tiny is taken as it is" in said


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (
            (401, {"error": "bad key"}),
            r"a question about a picture failed: .*refused \(401\).*bad key.* OPENAI_API_KEY's",
        ),
        (
            (400, {"error": "tiny takes no image"}),
            r"refused \(400\).*takes no image.*; allowed is a model that takes pictures",
        ),
        ((200, {"error": "template"}), "is no chat completion; allowed is a model that takes pictures"),
        ((200, answer("<think>")), "answered '<think>', which is no score; allowed is a model that answers at once"),
    ],
)
def test_what_would_fail_in_the_first_update_is_refused_before(reply, expected):
    with pytest.raises(UserError, match=f"rewards: vlm_judge@http.*#tiny: .*{expected}"):
        greeted(lambda body: reply, lists("tiny"))


def test_a_key_that_the_list_refuses_is_named():
    with pytest.raises(UserError, match=r"/v1/models wants another key \(401\); set OPENAI_API_KEY"):
        greeted(seeing, lambda path: (401, {}))


def test_a_judge_that_does_not_look_is_told_of():
    (said,), _ = greeted(lambda body: (200, answer("Yes", Yes=0.7, No=0.3)), lists("tiny"))
    assert said.endswith(
        "gives 0.7 to a red picture and to a blue one, asked for a plain red picture; does it see them?"
    )
    with pytest.raises(UserError, match="answered 'Score: high', which is no score"):
        greeted(lambda body: (200, answer("Score: high")), lists("tiny"), judge="vlm_points")


def test_a_judge_that_is_not_up_yet_is_waited_for(monkeypatch):
    monkeypatch.setattr(http, "PAUSE", 0.02)
    answers = iter([(503, {}), (502, {})])
    said, asked = greeted(seeing, lambda path: next(answers, (200, {"data": [{"id": "tiny"}]})))
    assert asked == 2
    assert [line.partition(" (")[0].rpartition("/v1")[2] for line in said] == [", up to 5 s"]
    reward = load("vlm_judge@http://127.0.0.1:1/v1#m")
    reward._client.deadline = 0.1
    with pytest.raises(Fault, match=r"reward vlm_judge@http://127.0.0.1:1/v1#m: no server answers \(.*ConnectError"):
        reward.greet(said.append)
    troubled = iter([(200, {"data": [{"id": "tiny"}]})])
    monkeypatch.setattr(http, "FAILURES", 1)
    with pytest.raises(Fault, match=r"no answer to a question about a picture \(.*status 500"):
        greeted(lambda body: (500, {}), lambda path: next(troubled))


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
