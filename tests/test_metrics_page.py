"""Every number that a run logs has a row in docs/metrics.md: rules are trained for two updates, and the code is read."""

import ast
import json

import numpy as np
import pytest

from diffalign.backends.toy import ToyPolicy
from diffalign.evaluation.results import Evaluation
from diffalign.rules import RULES
from diffalign.runtime import keys
from diffalign.training.selection import Allocation, Scouts
from tests.kit import ROOT
from tests.kit.helpers import toy_trainer
from tools.docs import metrics

# Settings that log more than the defaults do.
MORE = {
    "flow_grpo": [
        {"kl": 0.1, "inner_updates": 2},
        {"trust": "kl", "kl_limit": 1e-3, "inner_updates": 2},
        {"floors": {"toy": 5.0}},
    ],
    "grpo_guard": [{"kl": 0.1, "inner_updates": 2}],
    "branch_grpo": [{"kl": 0.1, "splits": [0]}],
    "ddpo": [{"estimator": "score"}],
    "truncated_bp": [{"objective": "hinge", "target": 5.0}],
    "rlr": [{"cover": "zo"}, {"start": "norms"}],
    "awm": [{"kl": 0.1, "kl_gate": {"by": ["toy"]}}, {"implicit": "group"}],
    "nft": [{}],
    "distil": [{"teachers": {"*": "better"}}],
}


def unknown(keys) -> set[str]:
    return {key for key in keys if not any(row.matches(key) for row in metrics.ROWS)} - {"update"}


def logged(name: str, settings: dict) -> set[str]:
    rule = RULES[name](RULES[name].Settings(**settings))
    policy = ToyPolicy(steps=5)
    policy.add_shadows(rule.decays(0))
    trainer = toy_trainer(rule, policy)
    return {key for index in range(2) for key in trainer.update(index).row()}


def test_keys_of_selectors_have_rows():
    trainer = toy_trainer(RULES["awm"](), ToyPolicy(steps=5))
    seen = {keys.SCOUTS_INVALID}
    for trainer.selector in (Scouts(16, 2), Allocation(4, 12, 0.9)):
        seen |= {key for key in trainer.update(0).row() if key.startswith(("scouts/", "allocated/"))}
    assert len(seen) == 7
    assert unknown(seen) == set()


def _seen(name: str) -> set[str]:
    bare = [{}] if RULES[name]().needs.rewards else []  # one without rewards has nothing to learn from by itself
    return set().union(*(logged(name, settings) for settings in (*bare, *MORE[name])))


@pytest.mark.parametrize("name", RULES)
def test_every_key_of_a_rule_has_a_row(name):
    seen = _seen(name)
    assert {"grad_norm", "seconds/total", "nfe"} <= seen
    assert ("reward/total" in seen) == RULES[name]().needs.rewards
    assert unknown(seen) == set()


def test_every_row_of_the_rules_is_logged_by_one():
    seen = set().union(*map(_seen, RULES))
    assert [row.key for row in metrics.PARTS["rules"] if not any(row.matches(key) for key in seen)] == []


def test_keys_of_an_evaluation_have_rows():
    before = Evaluation(0, {"a": np.arange(32.0) % 5}, np.repeat(np.arange(8), 4))
    row = Evaluation(1, {"a": np.arange(32.0) % 3}, before.group).summary(before).row()
    assert len(row) == 7
    assert unknown(row) == set()


def test_what_the_code_names_has_a_row():
    """Keys that a test's run does not have: a card's memory, missing scores."""
    found = set()
    for place in ("runs/session.py", "training/trainer.py", "training/scoring.py", "types/__init__.py"):
        for node in ast.walk(ast.parse((ROOT / "diffalign" / place).read_text())):
            stored = isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)
            if (
                stored
                and isinstance(node.value, ast.Name)
                and node.value.id in ("row", "metrics")
                and isinstance(node.slice, ast.Constant)
            ):
                found.add(node.slice.value)
            elif isinstance(node, ast.Dict):
                names = {key.value for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}
                found |= {name for name in names if name.startswith("skipped")}
    assert found >= {"memory_gib", "skipped", "groups_flat", "skipped_flat", "skipped_nonfinite"}
    assert unknown(found | {"invalid/a reward"}) == set()


def test_runs_on_real_pipelines_have_no_other():
    results = json.loads(metrics.RESULTS.read_text())
    for run in (*results["runs"], *results["broken"]):
        assert unknown(run["keys"]) == set(), run["name"]
    assert {run["rule"]["name"] for run in results["runs"]} == set(RULES) - {"distil"}  # no run of it is told of yet
