"""PPO with a chosen KL: `trainer` and `config`, its loop, its rollouts and its loss."""
