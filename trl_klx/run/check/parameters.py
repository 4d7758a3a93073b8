"""What the models of a run consist of, those that the recipe does not name included."""

from typing import NamedTuple

from transformers import PreTrainedConfig

from ..recipe.algorithm import Algorithm
from ..recipe.arguments import Recipe
from ..sources.models import NamedModels, Weights, classifier_on_meta


class Models(NamedTuple):
    """The models of a run. `policy` includes an adapter, `base` does not; None where there is no such model."""

    config: PreTrainedConfig  # of the policy: hidden size, layers, vocabulary
    policy: Weights
    base: Weights
    reference: Weights | None
    value: Weights | None
    reward: Weights | None
    adapts_head: bool  # whether the adapter sits on the output head

    @property
    def trained(self) -> Weights:
        """What the optimizer sees, and what is loaded with it."""
        return self.policy if self.value is None else self.policy + self.value


def count_models(algorithm: Algorithm, recipe: Recipe, named: NamedModels) -> Models:
    """Count the models of a run, from those that its recipe names."""
    value = named.classifiers.get("value_model_path")
    if value is None and algorithm.has_value_model:
        value = Weights.of(classifier_on_meta(named.config, named.dtype))
    frozen = named.base._replace(trainable=0, trainable_bytes=0, trainable_tensors=0)
    reference = frozen if algorithm.loads_reference(recipe.args) and not recipe.model.use_peft else None
    reward = named.classifiers.get("reward_model_path")
    return Models(named.config, named.policy, named.base, reference, value, reward, named.adapts_head)
