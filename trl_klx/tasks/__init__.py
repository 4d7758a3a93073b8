"""What recipes train on: models, data and rewards that a command makes or fetches, and rows of other datasets."""
