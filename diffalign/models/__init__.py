"""Pipelines and what belongs to them: loading, single files, encoded prompts, LoRA attached, written and read, other tools' names."""
