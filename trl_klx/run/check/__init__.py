"""`--dry_run`: what a recipe would do, what it would need, and every problem found, without training anything."""
