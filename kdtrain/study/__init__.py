"""A study: one recipe, a grid of runs over methods, students, tasks and seeds, and what came out of it."""
