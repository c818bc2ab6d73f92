"""Monitors: what watches a run, and keeps its checkpoints and logs."""
