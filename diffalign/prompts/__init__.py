"""Where prompts come from: sets by name, files, stage prompts."""
