"""Rewards that ship with diffalign, one file each; see `diffalign.rewards.catalog` for how they announce themselves."""
