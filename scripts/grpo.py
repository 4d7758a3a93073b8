"""GRPO with a chosen KL, for `accelerate launch`.

accelerate launch --num_cpu_threads_per_process 1 --config_file recipes/accelerate/cpu.yaml scripts/grpo.py \
    --config recipes/starter/grpo_exact_both_pid.yaml

Any field of the recipe may be overridden: `--beta 0.1 --max_steps 50`. The code is in `trl_klx/run/grpo.py`.
"""

import sys

from trl_klx.run.grpo import main

if __name__ == "__main__":
    sys.exit(main())
