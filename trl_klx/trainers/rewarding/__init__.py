"""Reward functions and reward models as the trainers call them; and the gold reward."""
