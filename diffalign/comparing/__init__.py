"""Instruments that compare rules: their gradients on one batch, and what they learn at equal budgets."""
