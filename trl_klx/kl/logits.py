"""What a model does between the projection of its output head and the logits that answers are sampled by."""

from typing import Any, NamedTuple

from torch import Tensor


class LogitTransform(NamedTuple):
    """logits = softcap * tanh(scale * x / softcap) / temperature, or scale * x / temperature, of x = h W^T + b.

    Args:
        scale: factor on the raw logits (Cohere, Granite, ...).
        softcap: Gemma's final_logit_softcapping; None for most.
        temperature: sampling temperature.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @classmethod
    def of(cls, config: Any, temperature: float = 1.0) -> "LogitTransform":
        """What a model's config declares of its architecture."""
        config = config.get_text_config()
        softcap = getattr(config, "final_logit_softcapping", None)
        for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):  # Cohere; Muse Glimmer; Falcon-H1
            if getattr(config, name, None) is not None:
                return cls(getattr(config, name), softcap, temperature)
        scaling = getattr(config, "logits_scaling", None)
        if scaling is None:
            return cls(1.0, softcap, temperature)
        # Granite and MiniCPM3 divide by it, HyperCLOVA X multiplies.
        return cls(scaling if config.model_type == "hyperclovax" else 1 / scaling, softcap, temperature)

    @property
    def arguments(self) -> dict[str, Any]:
        """As the functions of `chunked` take it."""
        return {"temperature": self.temperature, "logit_scale": self.scale, "softcap": self.softcap}

    def apply_(self, raw: Tensor) -> Tensor:
        """Replace (..., V) raw logits by the final ones."""
        if self.scale != 1.0:
            raw.mul_(self.scale)
        if self.softcap is not None:
            raw.div_(self.softcap).tanh_().mul_(self.softcap)
        return raw if self.temperature == 1.0 else raw.div_(self.temperature)

    def apply(self, raw: Tensor) -> Tensor:
        """`apply_` to a copy; `raw` itself where there is nothing to do."""
        is_identity = self.scale == 1.0 and self.softcap is None and self.temperature == 1.0
        return raw if is_identity else self.apply_(raw.clone())

    def backward_(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Replace a gradient at the final `logits`, (..., V), by that at the raw ones."""
        factor = self.scale / self.temperature
        if self.softcap is not None:
            grad.mul_(1 - (logits * (self.temperature / self.softcap)).square_())
        return grad if factor == 1.0 else grad.mul_(factor)


def check_transform(transform: LogitTransform) -> None:
    """Raise ValueError where temperature or softcap are out of range."""
    if not transform.temperature > 0 or (transform.softcap is not None and not transform.softcap > 0):
        raise ValueError(
            f"temperature={transform.temperature} and softcap={transform.softcap} must be positive (softcap may be "
            "None)."
        )
