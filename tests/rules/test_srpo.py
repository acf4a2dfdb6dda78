"""SRPO: one step from the finished latent noised with a noise that is known, which is taken out again; numbers are those of the list."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffalign import ops
from diffalign.backends.toy import ToyPolicy, toy_reward
from diffalign.config import load
from diffalign.errors import UserError
from diffalign.processes import PROCESSES, Levels
from diffalign.rewards.base import as_reward
from diffalign.rewards.contrast import Contrast
from diffalign.rules import TruncatedBP
from diffalign.rules import _forward as forward
from diffalign.runtime.randomness import Purpose, normal
from diffalign.types import Media, Plan, Term
from tests.kit.helpers import gradient, toy_prompts, toy_trainer
from tests.rules.test_flow_bp import moved, planned

ANGLE = np.linspace(1.4, 0.0, 5)
CLOSE = dict(rtol=1e-11, atol=1e-12)  # float64; the first step divides by an alpha of 0.1 to 0.3


def rule(**given) -> TruncatedBP:
    return TruncatedBP(TruncatedBP.Settings(**{"connect": "known_noise", **given}))


def policies():
    """Every kernel, and every prediction there is for the one that takes several."""
    yield from ((name, moved(name)) for name in PROCESSES)
    for kind in ("v_prediction", "sample"):
        yield kind, moved("ddim", levels=Levels(np.cos(ANGLE), np.sin(ANGLE), kind))


every_policy = pytest.mark.parametrize("policy", [p for _, p in policies()], ids=[n for n, _ in policies()])


def noised(policy: ToyPolicy, step: int):
    """A rollout's end, and what that step starts from: the latent and the noise in it, by the forward process written out."""
    given = toy_prompts(2, 4)
    part = policy.rollout(given, Plan(4, (False,) * 4, ((Term(step, step + 1, "reward", draw=7),),)))
    noise = normal([int(seed) for seed in given.seed], (3,), Purpose.VARIANT, 7, like=part.x[4])
    alpha, sigma = float(policy.schedule.alpha[step]), float(policy.schedule.sigma[step])
    return part, noise, alpha * part.x[4] + sigma * noise


@every_policy
@pytest.mark.parametrize("step", range(4))
def test_52_a_right_network_gives_the_sample_back(policy, step, monkeypatch):
    part, noise, x = noised(policy, step)
    level = float(policy.schedule.alpha[step]), float(policy.schedule.sigma[step])
    right = ops.matching.target(part.x[4], noise, *level, policy.schedule.prediction)

    def network(seen, time):
        torch.testing.assert_close(seen, x, **CLOSE)
        return right

    monkeypatch.setattr(policy, "network", network)
    torch.testing.assert_close(forward.stepped(policy, part, step, 7), part.x[4], **CLOSE)


def slope(policy, part, step, monkeypatch, found=forward.stepped) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient to the network's prediction through the reward, and that of the reward to the clean sample."""
    with torch.no_grad():
        predicted = policy.network(noised(policy, step)[2], policy.schedule.sigma[step] * torch.ones(8).double())
    predicted.requires_grad_()
    monkeypatch.setattr(policy, "network", lambda seen, time: predicted)
    clean = found(policy, part, step, 7)
    clean.retain_grad()
    toy_reward(policy.decode(part, clean), part.prompts).sum().backward()
    return predicted.grad, clean.grad


def of_prediction(policy, step) -> float:
    """b / alpha' by the levels alone: sigma' - sigma over alpha' for velocities, lambda' - lambda for epsilon."""
    a, s = policy.schedule.alpha, policy.schedule.sigma
    to_noise = {
        "velocity": (s[step + 1] - s[step]) / a[step + 1],
        "epsilon": s[step + 1] / a[step + 1] - s[step] / a[step],
        # n = s x + a v and n = (x - a x_0) / s
        "v_prediction": (s[step + 1] / a[step + 1] - s[step] / a[step]) * a[step],
        "sample": (s[step + 1] / a[step + 1] - s[step] / a[step]) * -a[step] / s[step],
    }
    return float(to_noise[policy.schedule.prediction])


@every_policy
@pytest.mark.parametrize("step", [1, 2])
def test_53_the_gradient_to_a_prediction_is_the_clean_samples_times_b_over_alpha(policy, step, monkeypatch):
    part, *_ = noised(policy, step)
    got, clean = slope(policy, part, step, monkeypatch)
    torch.testing.assert_close(got, of_prediction(policy, step) * clean, **CLOSE)
    assert clean.abs().max() > 1e-3


@every_policy
@pytest.mark.parametrize("step", [1, 2])
def test_55_with_the_estimated_noise_it_is_not(policy, step, monkeypatch):
    """What a prediction itself says of the noise takes out what the step did: the clean sample it implies, with that one's gradient."""
    part, *_ = noised(policy, step)

    def estimated(policy, part, step, draw):
        part, _ = forward.renoised(part, policy.schedule, step, Purpose.VARIANT, draw)
        return policy.replay(part, step, step + 1).clean

    got, clean = slope(policy, part, step, monkeypatch, estimated)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(got, of_prediction(policy, step) * clean, rtol=0.05, atol=0)


def test_55_a_wrong_network_moves_the_sample_less_than_its_own_estimate_would():
    policy = moved("flow_sde")
    for step in range(4):
        part, _, x = noised(policy, step)
        sigma = float(policy.schedule.sigma[step])
        with torch.no_grad():
            own = x - sigma * policy.network(x, sigma * torch.ones(8).double())
        known = (forward.stepped(policy, part, step, 7) - part.x[4]).detach().norm()
        assert known <= (own - part.x[4]).norm() * (1 + 1e-12)  # the last step leads to the estimate itself


@pytest.mark.parametrize("micro_batch", [None, 5])
def test_the_rules_gradient_is_that_of_the_formula(micro_batch):
    policy, given = moved("flow_sde"), toy_prompts(2, 8)
    form = rule(judged=(2, 2))
    term = planned(form, policy).updates[0][0]
    assert (term.start, term.stop) == (1, 2)
    end = policy.rollout(given, Plan.deterministic(4)).x[4]
    noise = normal([int(seed) for seed in given.seed], (3,), Purpose.VARIANT, term.draw, like=end)
    delta, (s, to) = policy.delta.detach().clone().requires_grad_(), policy.schedule.sigma[1:3]
    x = (1 - s) * end + s * noise
    v = torch.cat([x, torch.full((16, 1), s), torch.ones(16, 1)], 1).double() @ (policy.base + delta).T
    clean = (x + (to - s) * v - to * noise) / (1 - to)
    (-toy_reward(policy.pixels(given, clean), given).mean()).backward()
    np.testing.assert_allclose(gradient(form, policy, given, micro_batch), delta.grad.numpy(), rtol=1e-10, atol=1e-13)


def test_levels_are_drawn_among_those_that_are_asked_for():
    policy = ToyPolicy(steps=10)
    terms = [planned(rule(judged=(2, 5)), policy, update).updates[0][0] for update in range(100)]
    assert {term.stop for term in terms} == {2, 3, 4, 5}
    assert all(term.stop - term.start == 1 for term in terms)
    assert len({term.draw for term in terms}) == 100
    assert {planned(rule(), policy, update).updates[0][0].stop for update in range(200)} == set(range(1, 11))


@pytest.mark.parametrize("given", [{"noise": True}, {"depth": 2}, {"variants": 1}, {"detached": True}, {"gamma": 0.1}])
def test_settings_that_do_not_fit_are_named(given):
    (problem,) = rule(**given).settings.problems(10)
    assert problem.startswith(f"rule.{next(iter(given))}: got ")
    assert not rule(judged=(1, 6), objective="hinge", target=0.7).settings.problems(10)


# -- the contrast


def by_words(media: Media, prompts) -> torch.Tensor:
    """Likes bright pictures, and the more so the more letters are asked for."""
    return toy_reward(media, prompts) * torch.tensor([float(len(text)) for text in prompts.text])


def test_54_equal_words_leave_nothing():
    policy, given = moved("flow_sde"), toy_prompts(2, 8)
    for form in (rule(), TruncatedBP(TruncatedBP.Settings(depth=2))):
        trainer = toy_trainer(form, policy, micro_batch=16)
        trainer.scorer.rewards["toy"] = Contrast(trainer.scorer.rewards["toy"], "fine", "fine")
        trainer.draw = lambda _: given
        found = trainer.gradient(0)
        assert torch.equal(policy.delta.grad, torch.zeros_like(policy.delta))
        assert found.metrics["reward/toy"] == 0


def test_54_other_words_leave_their_difference_with_its_gradient():
    policy, given = moved("flow_sde"), toy_prompts(2, 4)
    pixels = policy.decode(policy.rollout(given, Plan.deterministic(4)), torch.randn(8, 3).double()).pixels
    pixels.requires_grad_()
    values = Contrast(as_reward(by_words), "very fine", "bad")(Media(pixels), given)
    plain = toy_reward(Media(pixels), given)
    torch.testing.assert_close(values, plain * (len("very fine") - len("bad")))
    (one,), (other,) = (torch.autograd.grad(v.sum(), pixels, retain_graph=True) for v in (values, plain))
    torch.testing.assert_close(one, 6 * other)


def test_a_reward_that_does_not_look_at_the_text_is_refused_once_a_gradient_is_asked_for():
    given = toy_prompts(1, 2)
    pixels = torch.rand(2, 1, 3, 1, 1).double().requires_grad_()
    blind = Contrast(as_reward(toy_reward), "fine", "bad")
    with torch.no_grad():
        assert blind(Media(pixels), given).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="scoring.contrast: .* does not look at the prompt's text"):
        blind(Media(pixels), given)
    seeing = Contrast(as_reward(by_words), "fine", "bad")
    seeing(Media(pixels), given)
    seeing(Media(pixels * 0 + 0.0), given)  # equal scores of some pictures are no reason, once it told others apart


def test_54_lists_without_a_score_stay_without():
    reward = as_reward(lambda media, prompts: [None, float(len(prompts.text[1]))])
    found = Contrast(reward, "aaa", "a")(None, toy_prompts(1, 2))
    assert np.isnan(found[0])
    assert found[1] == 2


def test_a_contrast_is_of_a_reward_of_the_run():
    words = "{plus: Sharp., minus: Blurred.}"
    load("truncated_bp/shapes-sd3", [f"scoring.contrast={{shapes_pref: {words}}}", "rewards={shapes_pref: 1.0}"])
    with pytest.raises(
        UserError, match="scoring.contrast: got 'pickscore', allowed are rewards of this run: shapes_pref"
    ):
        load("truncated_bp/shapes-sd3", [f"scoring.contrast={{pickscore: {words}}}", "rewards={shapes_pref: 1.0}"])
    with pytest.raises(UserError, match="scoring.contrast.shapes_pref.minus: got the words of plus"):
        load("truncated_bp/shapes-sd3", ["scoring.contrast={shapes_pref: {plus: a, minus: a}}"])
    with pytest.raises(UserError, match="scoring.contrast.shapes_pref.minus"):
        load("truncated_bp/shapes-sd3", ["scoring.contrast={shapes_pref: {plus: a}}", "rewards={shapes_pref: 1.0}"])
