"""Heads spread over processes against the same head in one process."""

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tilework.losses import LinearCrossEntropy, VocabShard, linear_cross_entropy, linear_log_probs

import processes

CLASSES, FEATURES, TOKENS = 1001, 6, 12
# Unequal shards for each number of processes; the last process holds the first classes.
BOUNDS = {2: [0, 700, 1001], 4: [0, 1, 400, 999, 1001]}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum", "z_loss": 0.1},
    "none": {"reduction": "none", "softcap": 3.0},
    "every option": {
        "label_smoothing": 0.2,
        "softcap": 5.0,
        "z_loss": 0.1,
        "weight": ...,
        "token_weight": ...,
    },
    "smoothing alone": {"label_smoothing": 0.3},
}
FIELDS = {"softcap": 4.0, "temperature": 0.6}


def problem() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    target = torch.randint(CLASSES, (2, TOKENS // 2), generator=generator)
    target[0, :3] = torch.tensor([-100, 0, 1000])

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    head = normal(CLASSES, FEATURES)
    head[3] = head[900]  # equal outputs in different shards
    bias = normal(CLASSES)
    bias[3] = bias[900] = 9.0
    target[1, 2] = 3
    absent = torch.arange(400)
    bias[absent[~torch.isin(absent, target)]] = -torch.inf
    return {
        "input": normal(2, TOKENS // 2, FEATURES),
        "linear_weight": head,
        "linear_bias": bias,
        "target": target,
        "weight": normal(CLASSES).abs(),
        "token_weight": normal(2, TOKENS // 2).abs(),
    }


def whole_bias(tensors: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
    """A class of probability zero makes a smoothed loss infinite."""
    bias = tensors["linear_bias"]
    return bias.clamp(min=-3) if "label_smoothing" in options else bias


def options_of(name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {key: tensors[key] if value is ... else value for key, value in OPTIONS[name].items()}


def gradients(result: Any, leaves: list[Tensor]) -> list[Tensor]:
    """The results, and the gradients of a function of them."""
    fields = list(result[:3]) if isinstance(result, tuple) else [result]
    loss = sum((field.sin() * (1 + index)).sum() for index, field in enumerate(fields))
    rest = list(result[3:]) if isinstance(result, tuple) else []
    return [*fields, *rest, *torch.autograd.grad(loss, leaves)]  # type: ignore[arg-type]


def alone() -> dict[str, list[Tensor]]:
    tensors = problem()
    results = {}
    for name in (*OPTIONS, "log_probs"):
        options = {} if name == "log_probs" else options_of(name, tensors)
        leaves = [
            tensor.clone().requires_grad_()
            for tensor in (tensors["input"], tensors["linear_weight"], whole_bias(tensors, options))
        ]
        arguments = (*leaves[:2], tensors["target"])
        if name == "log_probs":
            result: Any = linear_log_probs(*arguments, linear_bias=leaves[2], **FIELDS)
        else:
            result = linear_cross_entropy(*arguments, linear_bias=leaves[2], **options)
        results[name] = gradients(result, leaves)
    return results


def with_plain_shards() -> dict[str, list[Tensor]]:
    tensors = problem()
    ranks = dist.get_world_size()
    place = ranks - 1 - dist.get_rank()
    shard = VocabShard(*BOUNDS[ranks][place : place + 2])
    assert shard.classes == CLASSES
    held = slice(shard.start, shard.stop)
    results = {}
    for name in (*OPTIONS, "log_probs"):
        options = {} if name == "log_probs" else options_of(name, tensors)
        leaves = [
            tensor.clone().requires_grad_()
            for tensor in (
                tensors["input"],
                tensors["linear_weight"][held],
                whole_bias(tensors, options)[held],
            )
        ]
        arguments = (*leaves[:2], tensors["target"])
        more: dict[str, Any] = {"linear_bias": leaves[2], "vocab_parallel": shard}
        if name == "log_probs":
            result: Any = linear_log_probs(*arguments, **more, **FIELDS)
        else:
            result = linear_cross_entropy(*arguments, **more, **options)
        results[name] = gradients(result, leaves)
    return results


@pytest.mark.parametrize("ranks", [2, 4])
def test_plain_shards_equal_one_process(ranks: int) -> None:
    expected = alone()
    for rank, results in enumerate(processes.run(with_plain_shards, ranks)):
        place = ranks - 1 - rank
        held = slice(*BOUNDS[ranks][place : place + 2])
        for name, values in results.items():
            *others, weight, bias = expected[name]
            for value, truth in zip(values, [*others, weight[held], bias[held]], strict=True):
                torch.testing.assert_close(value, truth, rtol=1e-10, atol=1e-10, msg=name)


def with_distributed_tensors() -> dict[str, list[Tensor]]:
    """Classes over one dimension of the mesh, sequences over the other where there is one."""
    tensors = problem()
    ranks = dist.get_world_size()
    results: dict[str, list[Tensor]] = {}
    two = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("data", "model"))
    one = init_device_mesh("cpu", (ranks,))
    layouts = {
        "replicated": (one, [Shard(0)], [Replicate()]),
        "sequences": (two, [Replicate(), Shard(0)], [Shard(0), Replicate()]),
        "positions": (two, [Replicate(), Shard(0)], [Shard(1), Replicate()]),
        "whole head": (one, [Replicate()], [Shard(0)] if ranks == 2 else [Replicate()]),
    }
    for (layout, (mesh, of_classes, of_tokens)), name in itertools.product(
        layouts.items(), (*OPTIONS, "log_probs")
    ):
        options = {} if name == "log_probs" else options_of(name, tensors)
        leaves = [
            distribute_tensor(tensor.clone(), mesh, placements).requires_grad_()
            for tensor, placements in (
                (tensors["input"], of_tokens),
                (tensors["linear_weight"], of_classes),
                (whole_bias(tensors, options), of_classes),
            )
        ]
        if "token_weight" in options:
            options["token_weight"] = distribute_tensor(options["token_weight"], mesh, of_tokens)
        arguments = (*leaves[:2], distribute_tensor(tensors["target"], mesh, of_tokens))
        if name == "log_probs":
            result: Any = linear_log_probs(*arguments, linear_bias=leaves[2], **FIELDS)
        else:
            result = linear_cross_entropy(*arguments, linear_bias=leaves[2], **options)
        results[f"{layout}/{name}"] = [
            value.full_tensor() if isinstance(value, DTensor) else value
            for value in gradients(result, leaves)
        ]
    return results


@pytest.mark.parametrize("ranks", [2, 4])
def test_distributed_tensors_equal_one_process(ranks: int) -> None:
    expected = alone()
    for results in processes.run(with_distributed_tensors, ranks):
        for name, values in results.items():
            for value, truth in zip(values, expected[name.partition("/")[2]], strict=True):
                torch.testing.assert_close(value, truth, rtol=1e-10, atol=1e-10, msg=name)


def errors() -> list[str]:
    """The messages of wrong calls, the same in both processes."""
    tensors = problem()
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    shard = VocabShard(500 * rank, 500 + 501 * rank)
    head, target, hidden = tensors["linear_weight"], tensors["target"], tensors["input"]
    replicated = distribute_tensor(hidden, mesh, [Replicate()])
    calls: list[Any] = [
        lambda: VocabShard(0, 500 + rank),
        lambda: VocabShard(500 * rank, 500 + 502 * rank - 1 + rank if rank else 499),
        lambda: VocabShard(3, 3),
        lambda: VocabShard(0.0, 3),  # type: ignore[arg-type]
        lambda: linear_cross_entropy(hidden, head, target, vocab_parallel=shard),
        lambda: linear_cross_entropy(hidden, head, target, vocab_parallel=(0, 500)),  # type: ignore[arg-type]
        lambda: linear_cross_entropy(
            replicated, distribute_tensor(head[:1], mesh, [Shard(0)]), target
        ),
        lambda: linear_cross_entropy(
            distribute_tensor(hidden, mesh, [Shard(1)]),
            distribute_tensor(head, mesh, [Replicate()]),
            distribute_tensor(target, mesh, [Shard(1)]),
            shift=1,
        ),
    ]
    messages = []
    for call in calls:
        try:
            call()
            messages.append("no error")
        except (ValueError, TypeError) as error:
            messages.append(f"{type(error).__name__} {error}")
    # What is right still works after them.
    criterion = LinearCrossEntropy(vocab_parallel=shard)
    messages.append(str(criterion(hidden, head[shard.start : shard.stop], target).item()))
    return messages


def test_bad_layouts() -> None:
    expected = [
        "ValueError VocabShard: start and stop must cover the classes without gap or overlap",
        "ValueError VocabShard: start and stop must cover the classes without gap or overlap",
        "ValueError VocabShard: stop must be above start",
        "TypeError VocabShard: start must be an int",
        "ValueError linear_cross_entropy: linear_weight must be of the 50",
        "TypeError linear_cross_entropy: vocab_parallel must be a VocabShard",
        "ValueError linear_cross_entropy: linear_weight must give each process",
        "ValueError linear_cross_entropy: shift above 0 must come with",
    ]
    for messages in processes.run(errors, 2):
        *messages, loss = messages
        for message, start in zip(messages, expected, strict=True):
            assert message.startswith(start)
        tensors = problem()
        truth = linear_cross_entropy(tensors["input"], tensors["linear_weight"], tensors["target"])
        assert float(loss) == pytest.approx(truth.item(), rel=1e-12)
