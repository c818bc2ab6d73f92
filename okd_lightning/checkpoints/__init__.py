"""What a checkpoint holds, how it lies on disk, and how it gets there whole."""
