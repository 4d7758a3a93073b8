"""What a run leaves in its folder and on the Hub: whole checkpoints, and nothing of another's deleted."""
