"""What checkpoints predict: their next-token distributions on given responses, against a reference's.

Teacher forcing: every model reads prompt and response as they are, and is compared token by token. `measure_kl` is the
library form, `trl-klx measure` the command; docs/measure.md explains both.
"""

from .api import measure_kl
from .passes.errors import MeasureError

__all__ = ["MeasureError", "measure_kl"]
