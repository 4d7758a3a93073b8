"""A progress bar that shows what one watches in KL-controlled training: reward, KL and beta."""

from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments

from .metrics import evaluated_sets, set_name

# (label, metric), as far as logged: DPO has a margin instead of a reward. In evaluation they carry the prefix eval_.
_SHOWN = (
    ("reward", "reward"),
    ("gold", "rewards/gold/mean"),
    ("margin", "rewards/margins"),
    ("kl/seq", "kl/sequence"),
    ("kl/origin", "kl/origin"),
)


class KLProgressCallback(ProgressCallback):
    """transformers' progress bar, with three numbers beside it instead of a printed dictionary of all metrics.

    Args:
        coef_name: what the trainer's config calls the weight of the KL: beta or kl_coef.
    """

    def __init__(self, coef_name: str = "beta") -> None:
        super().__init__()
        self._shown = (*_SHOWN, (coef_name, "kl/coef"))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        shown = {label: f"{logs[name]:.3g}" for label, name in self._shown if logs.get(name) is not None}
        if shown:
            self.training_bar.set_postfix(shown)
        for prefix in evaluated_sets([logs], *(name for _, name in self._shown)):
            values = [(label, logs.get(prefix + name)) for label, name in self._shown]
            numbers = ", ".join(f"{label} {value:.3g}" for label, value in values if value is not None)
            of_set = f" ({set_name(prefix)})" if set_name(prefix) else ""
            self.training_bar.write(f"step {state.global_step}, held out{of_set}: {numbers}")
