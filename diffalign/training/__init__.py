"""One update: plan, sample, score, credit, backward, step."""
