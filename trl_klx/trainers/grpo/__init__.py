"""GRPO with a chosen KL: `trainer` and `config`, and what each step of its batch needs."""
