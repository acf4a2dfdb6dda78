"""Update rules. To add one: a file here, an entry in `RULES`, a config; the conformance test picks it up from the list.

Importing this needs neither torch nor diffusers: settings are checked before either is loaded.
"""

from __future__ import annotations

from diffalign.rules.policy_gradient import FlowGRPO

RULES = {rule.name: rule for rule in (FlowGRPO,)}

__all__ = ["RULES", "FlowGRPO"]
