"""Training, as every job does it: settings, the loop, what is recorded, and checkpoints."""
