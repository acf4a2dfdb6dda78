"""What the first sentence of an evaluation's page says."""

import pytest

from diffalign.evaluation import wording
from diffalign.evaluation.intervals import Interval


@pytest.mark.parametrize(
    ("gain", "verdicts", "said"),
    [
        ((0.06, 0.019, 0.101), True, "a passes r 6.0 points more often than the base, 95 % 1.9 to 10.1."),
        ((-0.06, -0.101, -0.019), True, "a passes r 6.0 points less often than the base, 95 % 1.9 to 10.1."),
        ((0.01, -0.02, 0.04), True, "a and the base are not told apart by r: +1.0 points, 95 % -2.0 to +4.0."),
        ((0.25, 0.125, 0.5), False, "a scores 0.250 higher on r than the base, 95 % 0.125 to 0.500."),
        ((-0.25, -0.5, -0.125), False, "a scores 0.250 lower on r than the base, 95 % 0.125 to 0.500."),
        ((0.0, 0.0, 0.0), False, "a and the base are not told apart by r: +0.000, 95 % +0.000 to +0.000."),
        (
            (0.06, None, None),
            True,
            "a: +6.0 points on r against the base; of fewer than 8 prompts, or alike ones, there is no interval.",
        ),
    ],
)
def test_a_gain_is_said_with_its_interval(gain, verdicts, said):
    assert wording.against_base("a", "r", Interval(*gain), verdicts) == said


def test_a_model_alone_is_said_with_its_mean():
    assert wording.alone("a", "r", Interval(0.355, 0.3, 0.42), True) == "a passes r in 35.5 %, 95 % 30.0 to 42.0."
    assert wording.alone("a", "r", Interval(0.355), False) == "a scores 0.355 on r."
