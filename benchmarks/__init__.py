"""Time, memory and error of every operation beside eager PyTorch, public peers and the hardware's own floor."""
