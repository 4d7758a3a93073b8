"""`trl-klx explain`: which gradient a recipe has, what is wrong with it, and what to use instead."""
