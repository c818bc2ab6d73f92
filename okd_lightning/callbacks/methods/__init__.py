"""Methods: Lightning callbacks, each of which adds one weighted term to the loss."""
