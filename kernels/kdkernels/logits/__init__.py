"""Distillation between logits: `kd_loss`, `linear_kd_loss` and everything they share but arithmetic."""
