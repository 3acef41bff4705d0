"""`kdtrain demo`, and how the shipped teacher was made."""
