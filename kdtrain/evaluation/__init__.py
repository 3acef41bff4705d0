"""Measures of finished runs."""
