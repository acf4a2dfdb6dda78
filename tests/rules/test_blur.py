"""What a matching rule does to a distilled network: noise drawn anew pulls samples off the modes, its own states do not."""

import numpy as np
import torch

from diffalign.backends.toy import ToyPolicy
from diffalign.rewards.scorer import Scorer
from diffalign.rules import NFT
from diffalign.training.trainer import Trainer
from diffalign.types import Media, Plan
from tests.kit.helpers import toy_prompts

MODES, WIDTH = (-1.0, 1.0), 0.1
SMOOTH = 0.06  # of the map, in x
GRID = torch.linspace(-5, 5, 4001, dtype=torch.float64)
BUMPS = torch.linspace(-3, 3, 25, dtype=torch.float64)
SAMPLES = 512


def distilled(sigma: float) -> torch.Tensor:
    """Where the flow of two modes on a line leads from x_t, on the grid: the map of quantiles, smoothed as a network's is."""
    alpha = 1 - sigma

    def below(x, sigma, alpha):
        std = ((alpha * WIDTH) ** 2 + sigma**2) ** 0.5
        return sum(torch.special.ndtr((x - alpha * mode) / std) for mode in MODES) / 2

    quantiles = torch.from_numpy(np.interp(below(GRID, sigma, alpha), below(GRID, 0.0, 1.0), GRID))
    step = float(GRID[1] - GRID[0])
    reach = torch.arange(-int(4 * SMOOTH / step), int(4 * SMOOTH / step) + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (reach * step / SMOOTH) ** 2)
    padded = torch.nn.functional.pad(quantiles[None, None], (len(reach) // 2,) * 2, mode="replicate")
    return torch.nn.functional.conv1d(padded, (kernel / kernel.sum())[None, None])[0, 0]


class FewSteps(ToyPolicy):
    """Four calls of a distilled network on a line; trained, level by level: a warp of what goes in, and an offset of what comes out."""

    def __init__(self) -> None:
        super().__init__(dim=1, steps=4, process="ode", micro_batch=SAMPLES)
        self.maps = torch.stack([distilled(float(sigma)) for sigma in self.schedule.sigma[:-1]])
        self.delta = torch.zeros(4, 2, len(BUMPS), dtype=torch.float64).requires_grad_()
        self.parameters = {"delta": self.delta}

    def network(self, x, time):
        self.count(len(x))
        level = int(np.argmin(np.abs(self.schedule.sigma[:-1] - float(time[0]))))
        bumps = torch.exp(-0.5 * ((x - BUMPS) / (BUMPS[1] - BUMPS[0])) ** 2)
        warp, offset = (bumps @ self.delta[level].T).unbind(1)
        at = ((x[:, 0] + warp - GRID[0]) / (GRID[1] - GRID[0])).clamp(0, len(GRID) - 1.001)
        low = at.detach().floor().long()
        table = self.maps[level]
        clean = table[low] + (at - low) * (table[low + 1] - table[low]) + offset
        return (x - clean[:, None]) / time[:, None]

    def pixels(self, prompts, x, whole=True):
        return Media(torch.sigmoid(x).reshape(len(x), 1, 1, 1, 1).expand(-1, 1, 3, 1, 1))


def reward(media, prompts):
    return torch.sigmoid(torch.logit(media.pixels[:, 0, 0, 0, 0]) / 0.25)


def off_modes(policy) -> float:
    """The share of samples further than three widths from both modes."""
    prompts = toy_prompts(1, 4000, 7)
    x = policy.rollout(prompts, Plan.deterministic(4)).x[-1]
    return float(((x.abs() - 1).abs() > 3 * WIDTH).double().mean())


def trained(**settings) -> tuple[float, float]:
    """The share off both modes before, and when the mean reward is first 0.85 or more; it is 0.5 at first."""
    policy = FewSteps()
    before = off_modes(policy)
    rule = NFT(NFT.Settings(kl=0.0, **settings))
    trainer = Trainer(
        rule,
        policy,
        Scorer({"toy": reward}),
        torch.optim.Adam(policy.parameters.values(), lr=0.004),
        lambda update: toy_prompts(1, SAMPLES, 0, update),
    )
    for update in range(400):
        if trainer.update(update).metrics["reward/toy"] >= 0.85:
            return before, off_modes(policy)
    raise AssertionError("the reward did not rise")


def test_R22_at_equal_reward_noise_drawn_anew_blurs_and_states_of_its_own_do_not():
    """Found: 0.018 at first, 0.148 with noise drawn anew, 0.025 at its own states, 0.032 at the noisier half of the levels."""
    before, anew = trained()
    assert 0.01 < before < 0.03  # the network's own smoothness
    assert anew > 6 * before
    assert trained(states="own")[1] < 2 * before
    assert trained(levels=(0, 2), times=1)[1] < 2 * before
