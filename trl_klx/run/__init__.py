"""What a recipe does around a trainer: read and check its inputs, train, and report."""
