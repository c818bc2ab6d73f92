"""Metrics of the student's responses in validation and test."""
