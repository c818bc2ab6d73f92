"""What a training run is made of: the pair, a step over both sides, who writes, what is saved."""
