"""Model cards and pushing to the Hub: what a run says about itself, and what of it leaves the machine."""
