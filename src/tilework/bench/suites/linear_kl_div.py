"""The divergence between two linear heads, forward and backward.

Sizes: ``N`` tokens, ``D`` features of the student, ``E`` features of the teacher, ``V`` classes.
Logits have a standard deviation of 1.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tilework.bench.suites import (
    Candidate,
    Case,
    Growth,
    Inputs,
    Results,
    Step,
    Suite,
    implementations,
    loss_and_gradients,
)
from tilework.losses import linear_kl_div
from tilework.losses._classes.linear.common import product_operations

FORWARD, REVERSE, JSD = "forward KL", "reverse KL", "JSD"
DIVERGENCES = {FORWARD: "forward", REVERSE: "reverse", JSD: "jsd"}
BETA = 0.5
TRUTH_ROWS = 256

Divergence = Callable[[Tensor, Tensor], Tensor]
"""Of the student's and the teacher's logits."""


def cases(device: str) -> list[Case]:
    """Every divergence of a student that is smaller than its teacher; a small one."""
    head = {"N": 1024, "D": 768, "E": 1024, "V": 32768}
    small = {"N": 256, "D": 96, "E": 192, "V": 4096}
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    if device != "cpu":
        head = {"N": 8192, "D": 2048, "E": 4096, "V": 128256}
        small = {"N": 1024, "D": 512, "E": 1024, "V": 16384}
        dtypes = ("bfloat16",)
    return [
        *(Case(kind, head, dtypes) for kind in DIVERGENCES),
        Case(FORWARD, small, dtypes, quick=True),
    ]


def growth() -> tuple[Growth, ...]:
    """Tokens, then classes."""
    sizes = {"N": 256, "D": 64, "E": 128, "V": 4096}
    return tuple(
        Growth(over, tuple(Case(JSD, sizes | {over: 2**power}, ("float32",)) for power in powers))
        for over, powers in (("N", range(6, 14)), ("V", range(9, 17)))
    )


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Hidden states and weights of both heads, the student's with gradients."""
    tokens, features, teacher_features, classes = case.sizes.values()
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int, columns: int, scale: float) -> Tensor:
        return (torch.randn(rows, columns, device=device, generator=generator) * scale).to(dtype)

    return {
        "input": normal(tokens, features, 1.0).requires_grad_(),
        "weight": normal(classes, features, features**-0.5).requires_grad_(),
        "teacher input": normal(tokens, teacher_features, 1.0),
        "teacher weight": normal(classes, teacher_features, teacher_features**-0.5),
    }


def truth(case: Case, inputs: Inputs) -> Results:
    """The closed form in float64, a few rows at a time; no autograd."""
    input, weight, teacher_input, teacher_weight = (
        inputs[name].detach().double()
        for name in ("input", "weight", "teacher input", "teacher weight")
    )
    tokens = len(input)
    total = weight.new_zeros(())
    grad_input, grad_weight = torch.empty_like(input), torch.zeros_like(weight)
    for start in range(0, tokens, TRUTH_ROWS):
        rows = slice(start, start + TRUTH_ROWS)
        log_p = (input[rows] @ weight.T).log_softmax(1)
        log_q = (teacher_input[rows] @ teacher_weight.T).log_softmax(1)
        p, q = log_p.exp(), log_q.exp()
        if case.kind == FORWARD:
            values, grad = (q * (log_q - log_p)).sum(1), p - q
        else:
            log_m = log_q if case.kind == REVERSE else (BETA * q + (1 - BETA) * p).log()
            share = 1.0 if case.kind == REVERSE else 1 - BETA
            excess = log_p - log_m
            of_student = (p * excess).sum(1, keepdim=True)
            values, grad = share * of_student[:, 0], share * p * (excess - of_student)
            if case.kind == JSD:
                values = values + BETA * (q * (log_q - log_m)).sum(1)
        total += values.sum()
        grad /= tokens
        grad_input[rows] = grad @ weight
        grad_weight.addmm_(grad.T, input[rows])
    return {"loss": total / tokens, "grad input": grad_input, "grad weight": grad_weight}


def flops(case: Case) -> int:
    """A product of each head forward, two of the student's backward."""
    tokens, features, teacher_features, classes = case.sizes.values()
    student = product_operations(tokens, features, classes)
    return 3 * student + product_operations(tokens, teacher_features, classes)


def traffic(case: Case, dtype: torch.dtype) -> int:
    """Read both heads and their inputs, write two gradients."""
    tokens, features, teacher_features, classes = case.sizes.values()
    return (tokens + classes) * (2 * features + teacher_features) * dtype.itemsize


def _forward(student: Tensor, teacher: Tensor) -> Tensor:
    log_p, log_q = student.log_softmax(1), teacher.log_softmax(1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def _reverse(student: Tensor, teacher: Tensor) -> Tensor:
    return _forward(teacher, student)


def _jsd(student: Tensor, teacher: Tensor) -> Tensor:
    """As in TRL."""
    log_p, log_q = student.log_softmax(1), teacher.log_softmax(1)
    parts = torch.stack((log_q + math.log(BETA), log_p + math.log1p(-BETA)))
    log_m = parts.logsumexp(0)
    to_q = F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)
    to_p = F.kl_div(log_m, log_p, reduction="batchmean", log_target=True)
    return BETA * to_q + (1 - BETA) * to_p


COMPOSITIONS: dict[str, Divergence] = {FORWARD: _forward, REVERSE: _reverse, JSD: _jsd}


def _step(case: Case, inputs: Inputs, compiled: bool, kernel: str) -> Step:
    divergence = COMPOSITIONS[case.kind]

    def loss(
        input: Tensor, weight: Tensor, teacher_input: Tensor, teacher_weight: Tensor
    ) -> Tensor:
        with torch.no_grad():
            teacher = F.linear(teacher_input, teacher_weight).float()
        return divergence(F.linear(input, weight).float(), teacher)

    function = torch.compile(loss, dynamic=False) if compiled else loss
    return Step(loss_and_gradients(lambda: function(*inputs.values()), inputs), kernel)


def _ours(case: Case, inputs: Inputs, implementation: str) -> Callable[[], Results]:
    def loss() -> Tensor:
        return linear_kl_div(
            *inputs.values(),
            divergence=DIVERGENCES[case.kind],
            beta=BETA,
            implementation=implementation,
        )

    return loss_and_gradients(loss, inputs)


def _eager(case: Case, inputs: Inputs) -> Step:
    return _step(case, inputs, False, "F.kl_div(F.linear.float())")


def _compiled(case: Case, inputs: Inputs) -> Step:
    return _step(case, inputs, True, "inductor of F.kl_div(F.linear.float())")


SUITE = Suite(
    module=__name__,
    about="the divergence between a student's and a teacher's linear head",
    cases=cases,
    inputs=inputs,
    candidates=(
        *implementations("losses.linear_kl_div", _ours),
        Candidate("torch eager", _eager),
        Candidate("torch compile", _compiled),
    ),
    composition="torch eager",
    truth=truth,
    flops=flops,
    products=True,
    traffic=traffic,
    growth=growth(),
)
