"""Model cards and pushing to the Hub: what a run reports about itself, and what of it leaves the machine."""
