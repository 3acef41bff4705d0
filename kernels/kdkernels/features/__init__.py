"""Distillation between features: projections, relations between tokens, relations between the rows of a batch."""
