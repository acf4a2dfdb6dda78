"""The instrument: bias, variance and cost of rules' gradients."""
