"""Monitors: checkpoints, logs, progress and alarms of a run."""
