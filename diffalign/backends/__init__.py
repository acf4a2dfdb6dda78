"""Where policies come from: `chain` is what all share, `diffusers` wraps a pipeline, `toy` has known gradients."""
