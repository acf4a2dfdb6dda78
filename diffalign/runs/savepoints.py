"""Where a run can go on from: saved with all that it needs, and taken up again if nothing is another that must not be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from diffalign import config as configs
from diffalign.config import Config
from diffalign.evaluation.fixed import FixedSet
from diffalign.runs import state as states
from diffalign.runs.budget import Spent
from diffalign.runs.folder import RunFolder
from diffalign.runs.outputs import Outputs
from diffalign.runs.resume import check_digests, judged_since
from diffalign.runs.state import RunState
from diffalign.runtime.distributed import World
from diffalign.training.trainer import Trainer


@dataclass
class SavePoints:
    """A run's checkpoints, from its first to its last.

    digests: names for the content of what the run is begun with; change: whether other settings and content are accepted.
    """

    config: Config
    folder: RunFolder
    trainer: Trainer
    judged: FixedSet
    outputs: Outputs
    world: World
    digests: dict[str, str]
    say: Callable[[str], None]
    change: bool = False
    saved: int = -1

    def save(self, spent: Spent, skipped: int) -> None:
        """Keep everything after `spent.updates` updates, unless it was kept before."""
        if self.saved == spent.updates:
            return
        keep, beside = self.config.output.keep, self.outputs.adapter_beside

        def write() -> None:
            states.save(self.folder.store, self._state(spent, skipped), keep, self.judged.best(), beside)

        self.world.lead(write)
        self.saved = spent.updates

    def _state(self, spent: Spent, skipped: int) -> RunState:
        policy = self.trainer.policy
        return RunState(
            update=spent.updates,
            parameters=dict(policy.parameters),
            shadows=policy.shadows,
            optimizer=self.trainer.optimizer.state_dict(),
            rule=self.trainer.rule.state_dict(),
            selector=self.trainer.selector.state_dict(),
            micro_batch=policy.micro_batch,
            skipped=skipped,
            digests=self.digests,
            settings=configs.settings(self.config),
            given=configs.given(self.config),
            history=self.outputs.history,
            logs=self.folder.logs.digests(),
            spent=spent,
        )

    def resume(self) -> tuple[Spent, int]:
        """Take up the newest whole checkpoint, if there is one; what was spent, and how many updates were skipped. Processes may be more or
        fewer than before.

        Raises:
            UserError: if what the run began with is another now.
        """
        files = self.world.led(self.folder)
        newest = files.newest()
        state = None if newest is None else states.load(self.folder.store, newest)
        changes = [] if state is None else self._changes(state)
        files.begin(self.config)  # from here on the folder is written to
        if state is None:
            files.rewind(-1, {})
            return Spent(), 0
        self._restore(state, changes)
        files.rewind(state.update, state.logs)
        # A kill may have come between the newest checkpoint and the end of those before it.
        self.world.lead(lambda: self.folder.store.thin(self.config.output.keep, self.judged.best()))
        self.say(f"resuming after update {state.update} from {newest}")
        for line in changes:
            self.say(f"changed after update {state.update}: {line}")
        return state.spent, state.skipped

    def _changes(self, state: RunState) -> list[str]:
        """What is not as it was when the run was saved, as far as that is allowed."""
        content = check_digests(str(self.folder.path), state.digests, self.digests, self.change)
        return [*self.folder.taken.changes, *content]

    def _restore(self, state: RunState, changes: list[str]) -> None:
        policy = self.trainer.policy
        asked = policy.micro_batch
        states.restore(state, policy, self.trainer.optimizer, self.trainer.rule, self.trainer.selector)
        if any(line.startswith("optimizer.micro_batch:") for line in changes):
            policy.micro_batch = asked
        history = [*state.history, *([{"update": state.update, "changes": changes}] if changes else [])]
        self.outputs.history, self.judged.since = history, judged_since(history)
        self.saved = state.update
