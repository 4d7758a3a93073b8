"""Compares checkpoints with a reference on given responses, token by token, for `accelerate launch`.

accelerate launch --num_cpu_threads_per_process 1 --config_file recipes/accelerate/cpu.yaml scripts/measure_kl.py \
    --reference runs/starter/model --policies 'runs/grpo_exact_both_pid/checkpoint-*' --data responses.jsonl

The options are those of `trl-klx measure`. The code is in `trl_klx/measure`; docs/measure.md explains it.
"""

import sys

from trl_klx.measure.measure_command import main

if __name__ == "__main__":
    sys.exit(main())
