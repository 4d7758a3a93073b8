"""TRL's trainers with a chosen KL: `grpo`, `ppo` and `dpo`, each with its config. Import them from `trl_klx`.

Nothing is imported here: PPO exists up to TRL 1.12 only, and the others must work without it.
"""
