"""Models, data and rewards that a recipe names: read and checked before any model is loaded."""
