"""What a model is worth: the fixed set of a run, suites of prompts, intervals, reports."""
