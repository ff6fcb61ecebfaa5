"""The statistics of a linear head's logits, which are not stored, and sums of losses of these."""

from tilework._implementations import Implementation
from tilework.losses._classes.linear import schedule

IMPLEMENTATIONS = (
    Implementation.triton("gradients and 64 MiB of logit gradients"),
    Implementation(
        "chunked",
        "gradients and the logits of 512 tokens (CPU) or 4096 (CUDA)",
        backward="of sums and means, in the forward pass; others, and float16, as tiled or triton",
        prefers=schedule.prefers_chunks,
        when=schedule.PREFERRED,
    ),
    Implementation("tiled", "gradients and three tiles of 2048 x 1024 logits"),
    Implementation.reference("the logits, three times in training"),
)
