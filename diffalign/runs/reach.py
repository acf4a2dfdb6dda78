"""Whether what is trained reaches what is sampled: an adapter that is off, merged away or attached to nothing trains with a flat reward."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffalign.errors import Fault
from diffalign.runtime import keys
from diffalign.training.trainer import Trainer
from diffalign.types import Plan, Update

TRIES = 10  # updates: in bfloat16 the first, smallest steps may round to nothing


def acts(trainer: Trainer) -> bool:
    """Whether the adapter changes a prediction, as it is sampled with; before the first step it does not."""
    policy = trainer.policy
    part = policy.rollout(trainer.draw(0).select([0]), Plan(0, (False,) * policy.schedule.steps, ()))
    time = torch.full((1,), 0.5)
    with torch.no_grad():
        own = policy.predict(part, part.x[0], time)
        with policy.reference():
            return not torch.equal(own, policy.predict(part, part.x[0], time))


@dataclass
class Reach:
    """Looks, after a run's first updates, whether the adapter changes a prediction, until it does."""

    trainer: Trainer
    reached: bool = False
    tries: int = 0

    def check(self, update: Update) -> None:
        """Look after an update.

        Raises:
            Fault: if ten updates changed nothing.
        """
        # After a reset of the reference the two are equal.
        if self.reached or update.steps == update.nonfinite or keys.RESET in update.metrics:
            return
        self.tries += 1
        self.reached = any(self.trainer.world.gather(acts(self.trainer)))
        if not self.reached and self.tries == TRIES:
            raise Fault(
                f"the adapter was trained for {TRIES} updates and changes no prediction in a single bit: its layers do not run, "
                "or optimizer.lr is too small for the precision"
            )
