"""One training run: its parts, its folder, its checkpoints, what it tells and what it leaves behind."""
