"""The operator of the divergence between two linear heads and how it differentiates."""

from tilework import _operators
from tilework._operators import computation_dtype
from tilework.losses.linear_kl_div import reference
from tilework.losses.linear_kl_div.common import (
    STUDENT,
    SUMS,
    Divergences,
    Heads,
    backward_operations,
    operations,
)


def _fake(given: Heads) -> Divergences:
    input = given.student_input
    tokens, dtype = input.shape[0], computation_dtype(input.dtype)
    return Divergences(
        input.new_empty(tokens, dtype=dtype), input.new_empty((SUMS, tokens), dtype=dtype)
    )


divergences = _operators.define_pair(
    "linear_kl_div",
    Heads,
    Divergences,
    _fake,
    reference=reference.forward,
    rooms="tilework.losses.linear_kl_div",
    differentiable=STUDENT,
    saved=(*STUDENT, "teacher_input", "teacher_weight", "teacher_bias", "counted", "statistics"),
    constant=("statistics",),
    operations=operations,
    backward_operations=backward_operations,
)
