"""Soft-TIFA by hand: means over questions and over pictures, and what has no answer."""

import math

import pytest
import torch

from diffalign.ops.soft_tifa import Answered, means, spellings, summary


def test_j14_means_of_a_picture_are_over_its_own_questions():
    p = torch.tensor([0.9, 0.4, 0.8, 0.2, 1.0])
    geometric, arithmetic = means(p.log(), torch.tensor([0, 0, 1, 1, 1]), 2)
    assert geometric.tolist() == pytest.approx([math.sqrt(0.36), 0.16 ** (1 / 3)])
    assert arithmetic.tolist() == pytest.approx([0.65, 2 / 3])


def test_j14_a_certain_no_fails_its_prompt_and_a_missing_answer_is_not_left_out():
    p = torch.tensor([0.0, 1.0, float("nan"), 0.5, 0.5])
    geometric, arithmetic = means(p.log(), torch.tensor([0, 0, 1, 1, 2]), 4)
    assert geometric[0] == 0 and arithmetic[0] == 0.5
    assert geometric[1].isnan() and arithmetic[1].isnan()
    assert geometric[2] == pytest.approx(0.5)
    assert geometric[3].isnan() and arithmetic[3].isnan()  # nothing was asked


def test_the_gradient_of_a_geometric_mean_is_finite_where_a_probability_vanishes():
    log_p = torch.tensor([-200.0, 0.0], requires_grad=True)  # exp(-200) is 0 in float32
    geometric, _ = means(log_p, torch.tensor([0, 0]), 1)
    (slope,) = torch.autograd.grad(geometric.sum(), log_p)
    assert slope.tolist() == pytest.approx([math.exp(-100) / 2] * 2)


def test_j14_the_table_of_a_benchmark():
    pictures = [
        Answered([0.9, 0.4], ["object", "count"], 3),
        Answered([0.8, 0.2, 1.0], ["object", "count", "count"], 5),
        Answered([0.0, 1.0], ["object", "verb"], 3),
        Answered([float("nan"), 1.0], ["object", "verb"], 5),
        Answered([], [], 4),
    ]
    found = summary(pictures)
    assert found.geometric == pytest.approx(100 * (0.6 + 0.16 ** (1 / 3) + 0) / 3)  # over prompts of their own means
    assert found.arithmetic == pytest.approx(100 * (0.65 + 2 / 3 + 0.5) / 3)
    assert found.skills == pytest.approx({"object": 100 * 1.7 / 3, "count": 100 * 1.6 / 3, "verb": 100.0})
    assert found.atoms == pytest.approx({3: 100 * 0.6 / 2, 5: 100 * 0.16 ** (1 / 3)})
    assert (found.pictures, found.unscored) == (3, 2)
    assert math.isnan(summary(pictures[3:]).geometric)
    with pytest.raises(ValueError, match="got 1 answers and 2 skills; allowed is one skill a question"):
        summary([Answered([1.0], ["object", "verb"], 3)])


def test_an_answer_may_begin_in_several_ways():
    assert set(spellings("Yes")) == {"Yes", "yes", " Yes", " yes"}
    assert set(spellings("four")) == {"four", "Four", " four", " Four", "4", " 4"}
    assert set(spellings(" red ")) == {"red", "Red", " red", " Red"}
