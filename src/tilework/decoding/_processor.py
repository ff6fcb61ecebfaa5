"""What the logits processors share."""

from jaxtyping import Float, Int64
from torch import Tensor

from tilework._options import Options


class Processor(Options):
    """A filter of logits with its options, as ``transformers`` calls it."""

    def __call__(
        self, input_ids: Int64[Tensor, "batch length"], scores: Float[Tensor, "batch vocab"]
    ) -> Float[Tensor, "batch vocab"]:
        """Return the filtered scores; the tokens so far do not matter."""
        return self._filter(scores)

    def _filter(self, logits: Tensor) -> Tensor:
        raise NotImplementedError
