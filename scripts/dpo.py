"""DPO with a chosen KL, for `accelerate launch`.

accelerate launch --num_cpu_threads_per_process 1 --config_file recipes/accelerate/cpu.yaml scripts/dpo.py \
    --config recipes/starter/dpo_exact_loss.yaml

Any field of the recipe may be overridden: `--kl_coef 0.1 --max_steps 50`. The code is in `trl_klx/run/dpo.py`.
"""

import sys

from trl_klx.run.dpo import main

if __name__ == "__main__":
    sys.exit(main())
