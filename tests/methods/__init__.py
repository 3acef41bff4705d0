"""One test module for each paper."""
