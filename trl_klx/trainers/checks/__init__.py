"""What is refused in one sentence before a model is loaded."""
