"""Contents of checkpoints, their forms on disk, and atomic writing."""
