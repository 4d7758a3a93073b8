# %% [markdown]
# # GRPO with a KL target, in Python
#
# The starter model, which learns to sort digits, is trained for twenty steps while a PID controller moves beta towards
# a KL of 0.1 nats per sequence. About half a minute on two CPU cores, most of it for making the starter once:
#
#     python examples/grpo_in_python.py
#
# `recipes/starter/grpo_exact_both_pid.yaml` is the same as a recipe, with enough steps to reach its target.

# %%
from datasets import load_dataset

from trl_klx import KLXGRPOConfig, KLXGRPOTrainer
from trl_klx.rewards import exact_match
from trl_klx.tasks.starter import make_starter

starter = make_starter("runs/starter")  # an existing starter is kept
data = load_dataset(starter.data_dir)

# %% [markdown]
# Everything but the `kl_` fields is TRL's own.

# %%
args = KLXGRPOConfig(
    "runs/grpo_in_python",
    beta=0.5,  # where it starts
    kl_estimator="exact",
    kl_placement="both",
    kl_controller="pid",
    kl_target=0.1,
    kl_target_unit="sequence",
    max_steps=20,
    per_device_train_batch_size=64,
    num_generations=8,
    max_completion_length=8,
    learning_rate=1e-4,
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    logging_steps=5,
    save_strategy="no",
    report_to="none",
)
trainer = KLXGRPOTrainer(
    model=starter.model_dir,
    reward_funcs=exact_match,
    args=args,
    train_dataset=data["train"],
    eval_dataset=data["test"],
)
trainer.train()

# %% [markdown]
# What was logged: the exact KL with its standard error, in nats per sequence, and the beta that the controller set.

# %%
print(f"{'step':>6}{'reward':>10}{'KL':>18}{'beta':>8}")
for entry in trainer.state.log_history:
    if "kl/sequence" in entry:
        kl = f"{entry['kl/sequence']:.4f} ± {entry['kl/sequence_se']:.4f}"
        print(f"{entry['step']:>6}{entry['reward']:>10.3f}{kl:>18}{entry['kl/coef']:>8.3f}")
