"""Pictures and videos from a run, adapters or a model."""
