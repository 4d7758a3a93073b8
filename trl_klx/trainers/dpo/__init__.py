"""DPO with a chosen KL: `trainer` and `config`, and the probe that measures the policy's own KL."""
