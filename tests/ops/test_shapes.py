"""(N, 1) beside (N,) is refused wherever two tensors meet: broadcast, it would be a wrong number without a word."""

import pytest
import torch

from diffalign.ops import gaussian, matching, surrogate

ROWS, WIDE = torch.ones(3), torch.ones(3, 1)
MEETINGS = {
    "clipped": lambda a, b: surrogate.clipped(a, b, 0.1),
    "log_prob": lambda a, b: gaussian.log_prob(a, b, 1.0, "mean"),
    "divergence": lambda a, b: gaussian.divergence(a, b, 1.0, "mean"),
    "score_inner": lambda a, b: gaussian.score_inner(a, b, 1.0),
    "noised": lambda a, b: matching.noised(a, b, 0.5, 0.5),
    "target": lambda a, b: matching.target(a, b, 0.5, 0.5, "velocity"),
    "clean": lambda a, b: matching.clean(a, b, 0.5, 0.5, "velocity"),
    "error": matching.error,
}


@pytest.mark.parametrize("meeting", MEETINGS.values(), ids=MEETINGS)
@pytest.mark.parametrize(("a", "b"), [(ROWS, WIDE), (WIDE, ROWS), (torch.ones(3, 2), torch.ones(1, 2))])
def test_shapes_that_would_broadcast_are_refused(meeting, a, b):
    with pytest.raises(ValueError, match=r"shapes differ: \w+ \(\d.*\), \w+ \(\d"):
        meeting(a, b)
