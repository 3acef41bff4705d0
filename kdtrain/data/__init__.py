"""Data sets: reading, building and tokenizing them."""
