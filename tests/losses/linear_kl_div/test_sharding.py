"""Heads spread over processes against torch's composition in one process."""

import itertools
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tilework.losses import LinearKLDivLoss, VocabShard, linear_kl_div

import processes
from losses.linear_kl_div.problem import DIVERGENCES, Problem, composed

CLASSES, FEATURES, TEACHER_FEATURES, TOKENS = 1001, 6, 4, 12
# Unequal shards for each number of processes; the last process holds the first classes.
BOUNDS = {2: [0, 700, 1001], 4: [0, 1, 400, 999, 1001]}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum", "mask": ...},
    "every option": {
        "reduction": "none",
        "student_softcap": 3.0,
        "teacher_softcap": 4.0,
        "temperature": 0.7,
        "beta": 0.3,
        "mask": ...,
        "token_weight": ...,
    },
    "weighted mean": {"mask": ..., "token_weight": ..., "temperature": 2.0},
}
CASES = list(itertools.product(OPTIONS, DIVERGENCES))
OF_CLASSES = ("student_weight", "teacher_weight", "student_bias", "teacher_bias")
INPUTS = ("student_input", "teacher_input")


def problem(options: str = "plain", divergence: str = "forward") -> Problem:
    torch.manual_seed(7)
    result = Problem.random(
        *(TOKENS, FEATURES, CLASSES, torch.float64),
        teacher_features=TEACHER_FEATURES,
        bias=True,
        mask=1,
    )
    assert result.student_bias is not None
    assert result.teacher_bias is not None
    # Equal logits in different shards, the largest ones, and a shard of impossible classes.
    result.student_weight.data[3] = result.student_weight.data[900]
    result.teacher_weight[998] = result.teacher_weight[1000]
    result.student_bias.data[[3, 900]] = 9.0
    result.teacher_bias[[998, 1000]] = 8.0
    impossible = [index for index in range(400) if index != 3]
    result.student_bias.data[impossible] = -torch.inf
    result.teacher_bias[impossible] = -torch.inf
    if divergence == "jsd":
        result.teacher_bias[700:] = -torch.inf
    for name in ("student_input", "teacher_input"):
        tokens = getattr(result, name).detach().reshape(2, TOKENS // 2, -1)
        setattr(result, name, tokens)
    result.student_input.requires_grad_()
    tensors = {
        "mask": torch.rand(2, TOKENS // 2) < 0.7,
        "token_weight": torch.rand(2, TOKENS // 2, dtype=torch.float64),
    }
    chosen = {
        key: tensors[key] if value is ... else value for key, value in OPTIONS[options].items()
    }
    return result.with_options(divergence=divergence, **chosen)


def solve(call: Problem, function: Any) -> list[Tensor]:
    """The loss, and the gradients of a function of it."""
    loss = call.loss(function)
    return [loss, *torch.autograd.grad(loss.sin().sum(), call.leaves)]


def with_plain_shards() -> dict[str, list[Tensor]]:
    ranks = dist.get_world_size()
    place = ranks - 1 - dist.get_rank()
    shard = VocabShard(*BOUNDS[ranks][place : place + 2])
    results = {}
    for options, divergence in CASES:
        call = problem(options, divergence).with_options(vocab_parallel=shard)
        for name in OF_CLASSES:
            whole = getattr(call, name)
            held = whole.detach()[shard.start : shard.stop].clone()
            setattr(call, name, held.requires_grad_(whole.requires_grad))
        results[f"{options}/{divergence}"] = solve(call, linear_kl_div)
    return results


@pytest.mark.parametrize("ranks", [2, 4])
def test_plain_shards_equal_one_process(ranks: int) -> None:
    for rank, results in enumerate(processes.run(with_plain_shards, ranks)):
        place = ranks - 1 - rank
        held = slice(*BOUNDS[ranks][place : place + 2])
        for options, divergence in CASES:
            values = results[f"{options}/{divergence}"]
            *others, weight, bias = solve(problem(options, divergence), composed)
            for value, truth in zip(values, [*others, weight[held], bias[held]], strict=True):
                torch.testing.assert_close(value, truth, rtol=1e-10, atol=1e-10)


def with_distributed_tensors() -> dict[str, list[Tensor]]:
    """Classes over one dimension of the mesh, sequences over the other where there is one."""
    ranks = dist.get_world_size()
    two = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("data", "model"))
    one = init_device_mesh("cpu", (ranks,))
    layouts = {
        "replicated": (one, [Shard(0)], [Replicate()]),
        "sequences": (two, [Replicate(), Shard(0)], [Shard(0), Replicate()]),
        "positions": (two, [Replicate(), Shard(0)], [Shard(1), Replicate()]),
        "whole head": (one, [Replicate()], [Shard(0)] if ranks == 2 else [Replicate()]),
    }
    results: dict[str, list[Tensor]] = {}
    for (layout, (mesh, of_classes, of_tokens)), (options, divergence) in itertools.product(
        layouts.items(), CASES
    ):
        call = problem(options, divergence)
        for name in (*OF_CLASSES, *INPUTS):
            whole = getattr(call, name)
            placements = of_tokens if name in INPUTS else of_classes
            spread = distribute_tensor(whole.detach().clone(), mesh, placements)
            setattr(call, name, spread.requires_grad_(whole.requires_grad))
        for name in ("mask", "token_weight"):
            if name in call.options:
                call.options[name] = distribute_tensor(call.options[name], mesh, of_tokens)
        results[f"{layout}/{options}/{divergence}"] = [
            value.full_tensor() if isinstance(value, DTensor) else value
            for value in solve(call, linear_kl_div)
        ]
    return results


@pytest.mark.parametrize("ranks", [2, 4])
def test_distributed_tensors_equal_one_process(ranks: int) -> None:
    expected = {case: solve(problem(*case), composed) for case in CASES}
    for results in processes.run(with_distributed_tensors, ranks):
        assert len(results) == 4 * len(CASES)
        for name, values in results.items():
            _, options, divergence = name.split("/")
            for value, truth in zip(values, expected[options, divergence], strict=True):
                torch.testing.assert_close(value, truth, rtol=1e-10, atol=1e-10, msg=name)


def communication() -> dict[str, tuple[int, int, int]]:
    """Gathers forward, sums forward and sums backward of each divergence."""
    rank = dist.get_rank()
    shard = VocabShard(700 * rank, 700 + 301 * rank)
    counts = {}
    for divergence in DIVERGENCES:
        call = problem(divergence=divergence).with_options(vocab_parallel=shard)
        for name in OF_CLASSES:
            setattr(call, name, getattr(call, name)[shard.start : shard.stop])
        with (
            mock.patch.object(dist, "all_gather", wraps=dist.all_gather) as gather,
            mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduce,
        ):
            loss = call.loss(linear_kl_div)
            forward = reduce.call_count
            loss.backward()
            counts[divergence] = (gather.call_count, forward, reduce.call_count)
    return counts


def test_communication() -> None:
    for counts in processes.run(communication, 2):
        assert counts == {"forward": (1, 0, 1), "reverse": (1, 0, 1), "jsd": (2, 0, 1)}


def single_precision() -> list[Tensor]:
    """The gradient of a confident student, under autocast that must not reach the products."""
    rank = dist.get_rank()
    shard = VocabShard(2 * rank, 2 + rank)
    student = torch.tensor([[8.0], [0.0], [-3.0]])[shard.start : shard.stop]
    teacher = torch.tensor([[-8192.0], [0.0], [100.0]])[shard.start : shard.stop]
    hidden = torch.tensor([[1.0], [0.7], [1.3]], requires_grad=True)
    loss = linear_kl_div(
        *(hidden, student, torch.ones(3, 1), teacher),
        divergence="reverse",
        reduction="sum",
        vocab_parallel=shard,
    )
    half = [tensor.bfloat16() for tensor in (hidden, student, torch.ones(3, 1), teacher)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = linear_kl_div(hidden, student, torch.ones(3, 1), teacher, vocab_parallel=shard)
    expected = linear_kl_div(*half, vocab_parallel=shard)
    assert torch.equal(cast, expected)
    return [loss, *torch.autograd.grad(loss, hidden)]


def test_single_precision() -> None:
    exact = Problem(
        torch.tensor([[1.0], [0.7], [1.3]]).double().requires_grad_(),
        torch.tensor([[8.0], [0.0], [-3.0]]).double(),
        torch.ones(3, 1).double(),
        torch.tensor([[-8192.0], [0.0], [100.0]]).double(),
        options={"divergence": "reverse", "reduction": "sum"},
    )
    exact.student_weight.requires_grad_()
    loss, gradient, _ = exact.solve(composed)
    for result in processes.run(single_precision, 2):
        for value, truth in zip(result, (loss, gradient), strict=True):
            torch.testing.assert_close(value.double(), truth, rtol=1e-6, atol=0)


def errors() -> list[str]:
    """The messages of wrong calls, the same in both processes."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    shard = VocabShard(500 * rank, 500 + 501 * rank)
    call = problem()
    student, theirs, hidden, teacher = (
        tensor.detach()
        for tensor in (
            *(call.student_weight, call.teacher_weight),
            *(call.student_input, call.teacher_input),
        )
    )
    held = slice(shard.start, shard.stop)
    spread, their_spread = (distribute_tensor(head, mesh, [Shard(0)]) for head in (student, theirs))
    by_sequence = distribute_tensor(hidden, mesh, [Shard(0)])
    same, their_same = (
        distribute_tensor(tokens, mesh, [Replicate()]) for tokens in (hidden, teacher)
    )
    replicated, their_replicated = (
        distribute_tensor(head, mesh, [Replicate()]) for head in (student, theirs)
    )
    calls: list[Any] = [
        lambda: linear_kl_div(hidden, student, teacher, theirs[held], vocab_parallel=shard),
        lambda: linear_kl_div(hidden, student[held], teacher, theirs, vocab_parallel=shard),
        lambda: linear_kl_div(hidden, student[held], teacher, theirs[held], vocab_parallel=(0, 9)),  # type: ignore[arg-type]
        lambda: linear_kl_div(same, spread, teacher, theirs),
        lambda: linear_kl_div(hidden, student, their_same, their_spread),
        lambda: linear_kl_div(
            same, spread, their_same, distribute_tensor(theirs[:999], mesh, [Shard(0)])
        ),
        lambda: linear_kl_div(by_sequence, replicated, their_same, their_replicated),
        lambda: linear_kl_div(
            by_sequence,
            replicated,
            distribute_tensor(teacher, mesh, [Shard(1)]),
            their_replicated,
        ),
        lambda: linear_kl_div(same, spread, their_same, their_spread, implementation="reference"),
    ]
    messages = []
    for call_ in calls:
        try:
            call_()
            messages.append("no error")
        except (ValueError, TypeError) as error:
            messages.append(f"{type(error).__name__} {error}")
    # What is right still works after them.
    criterion = LinearKLDivLoss(vocab_parallel=shard)
    messages.append(str(criterion(hidden, student[held], teacher, theirs[held]).item()))
    return messages


def test_bad_layouts() -> None:
    expected = [
        "ValueError linear_kl_div: student_weight must be of the 50",
        "ValueError linear_kl_div: teacher_weight must be of the 50",
        "TypeError linear_kl_div: vocab_parallel must be a VocabShard",
        "ValueError linear_kl_div: teacher_weight must give each process the classes of "
        "student_weight, got all and",
        "ValueError linear_kl_div: teacher_weight must give each process the classes of "
        "student_weight, got",
        "ValueError linear_kl_div: teacher_weight must give each process the classes of "
        "student_weight, got",
        "ValueError linear_kl_div: teacher_input must be placed as student_input",
        "ValueError linear_kl_div: teacher_input must be placed as student_input",
        "ValueError linear_kl_div: implementation='reference' cannot be used: it takes whole heads",
    ]
    call = problem()
    truth = composed(*(tensor.detach() for tensor in call.tensors[:4] if tensor is not None))
    for messages in processes.run(errors, 2):
        *messages, loss = messages
        for message, start in zip(messages, expected, strict=True):
            assert message.startswith(start), message
        assert float(loss) == pytest.approx(truth.item(), rel=1e-12)
