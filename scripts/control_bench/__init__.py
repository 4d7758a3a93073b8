"""The parts of `scripts/benchmark_control_training.py`: its tasks, the traces of its runs, and what it says of them."""
