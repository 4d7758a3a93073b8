"""The exact KL inside a model's forward, and the output head that it reads."""
