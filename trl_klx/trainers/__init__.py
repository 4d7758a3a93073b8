"""TRL's trainers with a chosen KL: `grpo`, `ppo` and `dpo`, each with its config. Import them from `trl_klx`.

Nothing is imported here, so that each loads what it needs alone.
"""
