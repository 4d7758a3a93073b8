"""The KL of one run: what is measured, what beta is, and what was spent of the budget."""
