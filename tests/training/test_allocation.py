"""Groups of unequal size: more samples of prompts whose outcome is uncertain, each prompt weighs the same.

Numbers are those of the method's list of properties.
"""

import json

import numpy as np
import pytest
import torch

from diffalign import config
from diffalign.backends.toy import ToyPolicy, toy_reward
from diffalign.errors import UserError
from diffalign.prompts import book
from diffalign.rewards.base import Wrapped
from diffalign.rules import AWM, NFT, FlowGRPO
from diffalign.runs import state as states
from diffalign.runs.store import Store
from diffalign.runtime import keys
from diffalign.training.sampled import Drawn, Sampled
from diffalign.training.selection import Allocation, Everything, Scouts, Selected, allocated, resized
from diffalign.types import Credit, Plan, Scores, Update
from tests.kit.helpers import toy_prompts, toy_trainer


def given(texts: str, size: int, update: int = 0):
    return book.draw([{"prompt": text} for text in texts], len(texts), size, 0, update)


def judged(prompts, total) -> Update:
    total = np.asarray(total, float)
    valid = np.isfinite(total)
    return Update(judged=(prompts, Scores({}, np.where(valid, total, 0.0), valid)))


@pytest.mark.parametrize("make", [AWM, NFT, FlowGRPO])
def test_61_equal_rates_give_equal_sizes_and_change_no_bit(make):
    plain, even = (toy_trainer(make(), ToyPolicy(), 3, 8, micro_batch=4) for _ in range(2))
    even.selector = Allocation(4, 16, 0.9, unit=4)
    even.draw = plain.draw = lambda update: given("abc", 8, update)
    even.selector.after_update = lambda update: None  # so that rates stay equal
    for index in range(2):
        rows = [trainer.update(index).row() for trainer in (plain, even)]
        own = [{k: v for k, v in row.items() if not k.startswith(("allocated/", "seconds/"))} for row in rows]
        assert own[0] == own[1]
        assert rows[1][keys.FEWEST] == rows[1][keys.MOST] == 8
        assert rows[1][keys.PASS_RATE] == 0.5
    assert torch.equal(plain.policy.delta, even.policy.delta)
    assert plain.policy.delta.abs().max() > 0


def test_62_sizes_sum_to_the_budget_and_divide_by_the_micro_batch():
    rng = np.random.default_rng(0)
    for _ in range(50):
        groups, unit = int(rng.integers(1, 9)), int(rng.integers(1, 5))
        least, size, most = unit * np.sort(rng.integers(1, 9, 3))
        sizes = allocated(rng.random(groups), groups * size, least, most, unit)
        assert sizes.sum() == groups * size
        assert (sizes % unit == 0).all()
        assert sizes.min() >= least
        assert sizes.max() <= most
        equal = allocated(np.full(groups, 0.3), groups * size, least, most, unit)
        assert equal.tolist() == [size] * groups


def test_sizes_are_those_of_the_least_variance():
    """Against every other way to share 24 out, and where numbers are large against Neyman's shares."""
    spread = np.array([0.1, 0.5, 0.3])
    found = allocated(spread, 24, 2, 20, 2)
    ways = [(a, b, 24 - a - b) for a in range(2, 21, 2) for b in range(2, 21, 2) if 2 <= 24 - a - b <= 20]
    assert tuple(found) == min(ways, key=lambda sizes: (spread**2 / np.array(sizes)).sum())
    many = allocated(spread, 9000, 1, 9000, 1)
    np.testing.assert_allclose(many, 9000 * spread / spread.sum(), atol=1)  # whole numbers


class Given(Everything):
    """Some prompts, whatever was drawn."""

    prompts, uneven = None, False

    def select(self, prompts, plan, judge):
        return Selected(self.prompts, uneven=self.uneven)


def gradients():
    """A function from prompts, and whether groups weigh the same, to the gradient.

    The reward's slope is another one for each prompt, and what it is held against is a constant, whatever the size of the group.
    """
    policy, sign = ToyPolicy(steps=2), {"a": 1.0, "b": -1.0}
    many = given("a", 512)
    centre = toy_reward(policy.pixels(many, policy.rollout(many, Plan(2, (True, False), ())).x[-1]), many).mean()
    trainer = toy_trainer(FlowGRPO(FlowGRPO.Settings(window=None, scale="none")), policy)
    trainer.rule.credit = lambda tree, scores, _: Credit([scores.total[tree.leaf_root] for _ in tree.parent])
    plain = trainer.scorer.rewards["toy"]
    trainer.scorer.rewards["toy"] = Wrapped(
        lambda media, prompts: (plain(media, prompts) - centre) * torch.tensor([sign[text] for text in prompts.text])
    )
    trainer.selector = fixed = Given()

    def gradient(prompts, uneven: bool, micro_batch: int):
        policy.micro_batch = trainer.dealt = micro_batch
        fixed.prompts, fixed.uneven = prompts, uneven
        trainer.gradient(0)
        return policy.delta.grad.numpy().copy()

    return gradient


def test_63_the_mean_gradient_is_that_of_equal_sizes():
    """With row weights the larger group would count three times."""
    gradient = gradients()
    draws = [given("ab", 8, update) for update in range(40)]
    equal = np.array([gradient(each, False, 8) for each in draws])
    sizes = {"a": 4, "b": 12}
    uneven = [resized(each, {g: sizes[each.text[g * 8]] for g in (0, 1)}) for each in draws]

    def apart(weighed: bool) -> float:
        found = np.array([gradient(each, weighed, 4) for each in uneven]) - equal
        return float(np.abs(found.mean(0) / (found.std(0) / len(found) ** 0.5)).max())

    # In standard errors, the largest of 15 numbers.
    assert apart(True) < 4
    assert apart(False) > 5


def test_a_group_weighs_the_same_whatever_its_size():
    """Every sample of the second group twice: the same mean over groups, to rounding."""
    gradient, once = gradients(), given("ab", 4)
    twice = once.select([0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7])
    np.testing.assert_allclose(gradient(twice, True, 4), gradient(once, True, 4), rtol=1e-12)
    assert not np.allclose(gradient(twice, False, 4), gradient(once, True, 4), rtol=1e-3)


def test_shares_of_processes_add_up_to_one():
    prompts = resized(given("ab", 4), {0: 2, 1: 6})
    drawn = [Drawn(None, np.arange(8), np.array(rows), None) for rows in ([0, 1, 4, 5], [2, 3, 6, 7])]  # type: ignore[arg-type]
    shared = [Sampled([part], prompts, None, Update(), True) for part in drawn]
    assert shared[0].totals(drawn[0]).tolist() == [4, 4, 12, 12]
    assert [each.share for each in shared] == pytest.approx([2 / 3, 1 / 3])


def test_64_a_rate_follows_a_prompt_that_changes_and_resumes():
    stage, rng = Allocation(2, 14, 0.8), np.random.default_rng(0)
    prompts = given("ab", 8)
    where = np.array(prompts.text) == "a"
    stage.after_update(judged(prompts, [0.0] * 8 + [1.0] * 8))  # the range is known from here on
    seen = []
    for update in range(60):
        rate = 0.1 if update < 30 else 0.9
        seen.append(stage.rate("a"))
        stage.after_update(judged(prompts, np.where(where, rng.random(16) < rate, rng.random(16) < 0.5)))
    # 5 draws of 8 are what 0.8 remembers: a standard error of 0.05.
    assert abs(np.mean(seen[20:30]) - 0.1) < 0.15
    assert abs(np.mean(seen[45:]) - 0.9) < 0.15
    assert abs(stage.rate("b") - 0.5) < 0.2
    again = Allocation(2, 14, 0.8)
    again.load_state_dict(json.loads(json.dumps(stage.state_dict())))
    assert again.range == stage.range == (0.0, 1.0)
    one, other = (each.select(prompts, None, None).prompts for each in (stage, again))  # type: ignore[arg-type]
    assert one.seed.tolist() == other.seed.tolist()
    assert one.text.count("b") > one.text.count("a")


def test_scores_of_any_range_count_between_the_least_and_the_largest():
    stage, prompts = Allocation(2, 14, 0.0), given("ab", 2)
    where = {text: [k for k, own in enumerate(prompts.text) if own == text] for text in "ab"}
    stage.after_update(judged(prompts, [7.0] * 4))
    assert stage.rate("a") == 0.5  # no range yet
    total = np.zeros(4)
    total[where["a"]], total[where["b"]] = [3.0, np.nan], [4.0, 11.0]
    stage.after_update(judged(prompts, total))
    assert stage.rate("a") == 0.0
    assert stage.rate("b") == pytest.approx((1 / 8 + 1) / 2)


def test_65_prompts_that_were_not_seen_come_before_any_comes_again():
    entries = [{"prompt": text} for text in "abcdefg"]
    drawn = [text for update in range(14) for text in book.draw(entries, 1, 4, 0, update).text[:1]]
    assert sorted(drawn[:7]) == sorted(drawn[7:]) == list("abcdefg")
    assert Allocation(4, 8, 0.9).rate("a") == 0.5  # the most uncertain there is: at first they have the most samples


def test_a_run_state_keeps_it_and_older_ones_lack_it(tmp_path):
    optimizer = torch.optim.Adam([torch.zeros(2, requires_grad=True)])
    kept = {}
    for number, stage in enumerate((Allocation(4, 8, 0.9), Scouts(8, 2)), 1):
        stage.after_update(judged(toy_prompts(1, 4), [0.0, 1.0, 1.0, 1.0]))
        store = Store(tmp_path)
        state = states.RunState(number, {}, {}, optimizer.state_dict(), {}, 4, selector=stage.state_dict())
        kept[number] = states.load(store, states.save(store, state, keep=3)).selector
        header = json.loads((store.place(number) / "state.json").read_text())["state"]
        assert ("selector" in header) == (number == 1)
    assert kept[2] == {}
    again = Allocation(4, 8, 0.9)
    again.load_state_dict(kept[1])
    assert again.rate("a") == pytest.approx((0.9 + 3) / (1.8 + 4))
    again.load_state_dict({})
    assert again.rate("a") == 0.5


@pytest.mark.parametrize(
    ("name", "overrides", "said"),
    [
        ("truncated_bp", [], "prompts.allocate: got truncated_bp, which does not compare samples"),
        ("flow_grpo", ["rule.risk={bundle: 2}"], "prompts.allocate: got flow_grpo, which does not compare samples"),
        ("nft", ["prompts.allocate.least=24"], "prompts.allocate: got least 24 and most 32, allowed are"),
        ("nft", ["optimizer.micro_batch=16"], "optimizer.micro_batch: got 16 with prompts.allocate"),
        ("nft", ["prompts.scouts={pool: 32}"], "prompts.allocate: got it with prompts.scouts"),
    ],
)
def test_what_cannot_go_with_it_is_refused(name, overrides, said):
    allowed = ["prompts.allocate={least: 4, most: 32}", "optimizer.micro_batch=4"]
    with pytest.raises(UserError) as caught:
        config.load(f"{name}/shapes-sd3", [*allowed, *overrides])
    assert [line for line in caught.value.problems if line.startswith(said)], caught.value.problems
