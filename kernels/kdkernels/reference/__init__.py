"""The specification: every loss in plain eager PyTorch."""
