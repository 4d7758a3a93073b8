# %% [markdown]
# # What moves beta: controllers on a policy that is only an equation
#
# A controller reads the KL and returns the beta to use next. Here an equation stands in for the policy: the KL nears
# the level that beta allows, with a lag, and is read with noise. Halfway through, the reward pulls twice as hard. It
# takes a second:
#
#     python examples/controllers_on_a_plant.py
#
# `scripts/benchmark_controllers.py` does this on hundreds of such equations, and docs/controllers.md has its figures.

# %%
import random

from trl_klx.control import Controller, make_controller

UPDATES, TARGET, START = 400, 0.4, 0.05  # nats per sequence; beta starts at a tenth of what is needed
LAG = 0.05  # how much of the remaining distance the KL covers in one update

CONTROLLERS = {
    "fixed": make_controller("fixed", START),
    "cosine": make_controller("cosine", START, coef_end=0.5, total=UPDATES),
    "adaptive": make_controller("adaptive", START, target=TARGET, horizon=10_000),
    "pid": make_controller("pid", START, target=TARGET),
}


# %%
def run(controller: Controller, seed: int = 0) -> list[float]:
    """The true KL after each update."""
    noise, kl, course = random.Random(seed), 0.0, []
    for update in range(UPDATES):
        pull = 2.0 if update < UPDATES // 2 else 4.0  # the KL without any penalty
        steady = pull / (1 + controller.value / 0.4) ** 2
        kl += LAG * (steady - kl)
        controller.update(kl * noise.lognormvariate(0.0, 0.2), n=128)  # a batch of 128 answers reads it with 20 % noise
        course.append(kl)
    return course


# %% [markdown]
# The KL every 50 updates, the last beta, and the share of all updates whose KL is within a quarter of the target.

# %%
SHOWN = range(49, UPDATES, 50)
within = {}
print(f"target {TARGET}; KL at update:")
print(f"{'':<10}" + "".join(f"{update + 1:>8}" for update in SHOWN) + f"{'beta':>8}{'within 25 %':>14}")
for name, controller in CONTROLLERS.items():
    course = run(controller)
    within[name] = sum(abs(kl / TARGET - 1) < 0.25 for kl in course) / UPDATES
    row = "".join(f"{course[update]:>8.2f}" for update in SHOWN)
    print(f"{name:<10}{row}{controller.value:>8.2f}{within[name]:>14.0%}")
