"""Measures: what scores the student's responses in validation and tests."""
