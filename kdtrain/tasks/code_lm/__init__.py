"""Causal language models of code: `task: code_lm`. Logits are never stored, documents never see each other."""
