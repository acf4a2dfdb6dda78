"""Update rules. To add one: a file here, an entry in `RULES`, a config; the conformance test picks it up from the list.

Importing this needs neither torch nor diffusers: settings are checked before either is loaded.
"""

from __future__ import annotations

from diffalign.rules._few_steps import GAP, OwnWalk, own_walk
from diffalign.rules._matching import Matching
from diffalign.rules._merging import shares, units
from diffalign.rules._rule import Rule, RuleSettings
from diffalign.rules.awm import AWM
from diffalign.rules.branch_grpo import BranchGRPO
from diffalign.rules.ddpo import DDPO
from diffalign.rules.distil import Distil
from diffalign.rules.flow_grpo import FlowGRPO
from diffalign.rules.grpo_guard import GRPOGuard
from diffalign.rules.nft import NFT
from diffalign.rules.rlr import RLR
from diffalign.rules.truncated_bp import TruncatedBP

RULES: dict[str, type[Rule]] = {
    rule.name: rule for rule in (FlowGRPO, GRPOGuard, BranchGRPO, DDPO, TruncatedBP, RLR, AWM, NFT, Distil)
}

__all__ = [
    "AWM",
    "DDPO",
    "GAP",
    "NFT",
    "RLR",
    "RULES",
    "BranchGRPO",
    "Distil",
    "FlowGRPO",
    "GRPOGuard",
    "Matching",
    "OwnWalk",
    "Rule",
    "RuleSettings",
    "TruncatedBP",
    "own_walk",
    "shares",
    "units",
]
