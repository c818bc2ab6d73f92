"""Monitors: checkpoints, logs, progress bar and alarms of a run."""
