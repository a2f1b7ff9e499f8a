"""What a step changes, and how it is kept: masters, moments, average, checkpoints."""
