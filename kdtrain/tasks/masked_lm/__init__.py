"""Task masked_lm: an encoder that learns code before it learns a task, to become a teacher."""
