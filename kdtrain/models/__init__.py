"""Models: loading, heads, students, teachers, tokenizers."""
