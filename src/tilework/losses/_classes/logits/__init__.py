"""The statistics of logits that exist, and sums of losses of these with their gradients."""

import torch
from torch import Tensor

from tilework._implementations import Implementation
from tilework.losses._classes.blocks import is_eager


def _is_plain(input: Tensor) -> bool:
    return type(input) in (Tensor, torch.nn.Parameter)


IMPLEMENTATIONS = (
    Implementation.triton(
        "the gradient", prefers=_is_plain, when="tensors that are not distributed"
    ),
    Implementation(
        "tiled",
        "the gradient, which sums and means take in the forward pass, and blocks of 4 MiB",
        prefers=is_eager,
        when="on a CPU, outside of torch.compile, which fuses the definition, and torch.func",
    ),
    Implementation.reference("the logits, several times in training"),
)
