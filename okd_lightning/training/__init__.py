"""Parts of a training run: the pair, the step over both models, generation, and saved state."""
