"""Update rules. To add one: a file here, an entry in `RULES`, a config; the conformance test picks it up from the list.

Importing this needs neither torch nor diffusers: settings are checked before either is loaded.
"""

from __future__ import annotations

from diffalign.rules.ddpo import DDPO
from diffalign.rules.flow_grpo import FlowGRPO
from diffalign.rules.rlr import RLR
from diffalign.rules.truncated_bp import TruncatedBP

RULES = {rule.name: rule for rule in (FlowGRPO, DDPO, TruncatedBP, RLR)}

__all__ = ["DDPO", "RLR", "RULES", "FlowGRPO", "TruncatedBP"]
