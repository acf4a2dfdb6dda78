"""Rewards: the protocol and its checks (`base`), from names to objects (`catalog`, `load`)."""
