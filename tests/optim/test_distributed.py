"""Optimizers of sharded parameters: as on one process, and resharded from a checkpoint."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import processes
import samples
from optim.samples import Optimized

ROUNDINGS = ("nearest", "stochastic", "kahan")


def matrices(sample: Optimized) -> list[tuple[int, ...]]:
    """Shapes that two processes, and four, have unequal parts of."""
    return [(5, 4), (3, 7)] + ([(5,)] if (7,) in sample.shapes else [])


class Model(nn.Module):
    """Parameters of some shapes, whose gradients do not depend on the data."""

    def __init__(self, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList(
            torch.randn(shape, generator=generator).to(dtype) for shape in shapes
        )

    def forward(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        terms = []
        for weight in self.weights:
            local = weight.full_tensor() if isinstance(weight, DTensor) else weight
            slope = torch.randn(local.shape, generator=generator).to(local.dtype)
            terms.append((slope * local).sum().float())
        return torch.stack(terms).sum()


def run(model: nn.Module, optimizer: Any, sample: Optimized, seeds: range) -> None:
    for seed in seeds:
        optimizer.zero_grad()
        model(seed).backward()
        sample.step(optimizer)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def results(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    found = {}
    for index, parameter in enumerate(model.parameters()):
        found[f"{index}"] = whole(parameter.detach()).clone()
        for name, state in optimizer.state[parameter].items():
            found[f"{index}.{name}"] = whole(state).clone()
    return found


def cases(sample: Optimized) -> list[tuple[dict[str, Any], torch.dtype]]:
    options = dict(sample.accepts) | sample.options[-1]
    return [(options, torch.float32)] + [
        (options | {"rounding": rounding}, torch.bfloat16) for rounding in ROUNDINGS
    ]


def sharded() -> list[Any]:
    """Every optimizer under FSDP2, with all roundings."""
    found = []
    for sample in samples.collect(Optimized):
        for options, dtype in cases(sample):
            model = Model(matrices(sample), dtype)
            fully_shard(model)
            optimizer = sample.function(model.parameters(), **options)
            run(model, optimizer, sample, range(3))
            found.append(results(model, optimizer))
    return found


def test_fsdp_is_one_process() -> None:
    every = processes.run(sharded, 2)
    for found in every:
        numbers = iter(found)
        for sample in samples.collect(Optimized):
            for options, dtype in cases(sample):
                model = Model(matrices(sample), dtype)
                optimizer = sample.function(model.parameters(), **options)
                run(model, optimizer, sample, range(3))
                expected, actual = results(model, optimizer), next(numbers)
                assert actual.keys() == expected.keys()
                for name, value in expected.items():
                    message = f"{sample.name} {options} {name}"
                    assert actual[name].dtype == value.dtype, message
                    if sample.elementwise and dtype == torch.bfloat16:  # bits of random numbers
                        assert torch.equal(actual[name], value), message
                    else:
                        torch.testing.assert_close(actual[name], value, msg=message)


def spread_otherwise() -> list[Any]:
    """Shards of other dimensions, of two, and gradients placed otherwise than their parameters."""
    found = []
    mesh = init_device_mesh("cpu", (2, 2))
    for sample in samples.collect(Optimized):
        for options, dtype in cases(sample):
            model = Model([(5, 4), (3, 7)], dtype)
            parameters = [
                nn.Parameter(distribute_tensor(weight.detach(), mesh, placements))
                for weight, placements in zip(
                    model.weights, ((Shard(1), Shard(0)), (Shard(0), Shard(0))), strict=True
                )
            ]
            optimizer = sample.function(parameters, **options)
            generator = torch.Generator().manual_seed(1)
            for _ in range(2):
                for parameter in parameters:
                    slope = torch.randn(parameter.shape, generator=generator).to(dtype)
                    parameter.grad = distribute_tensor(slope, mesh, parameter.placements)
                sample.step(optimizer)
            found.append([whole(p.detach()) for p in parameters])
    return found


def test_other_shards_are_one_process() -> None:
    every = processes.run(spread_otherwise, 4)
    for found in every:
        numbers = iter(found)
        for sample in samples.collect(Optimized):
            for options, dtype in cases(sample):
                model = Model([(5, 4), (3, 7)], dtype)
                parameters = list(model.parameters())
                optimizer = sample.function(parameters, **options)
                generator = torch.Generator().manual_seed(1)
                for _ in range(2):
                    for parameter in parameters:
                        slope = torch.randn(parameter.shape, generator=generator).to(dtype)
                        parameter.grad = slope
                    sample.step(optimizer)
                for actual, expected in zip(next(numbers), parameters, strict=True):
                    message = f"{sample.name} {options}"
                    if sample.elementwise and dtype == torch.bfloat16:
                        assert torch.equal(actual, expected), message
                    else:
                        torch.testing.assert_close(actual, expected.detach(), msg=message)


def checkpointed(folder: Path) -> list[Any]:
    """What four processes save, and what two load and go on with."""
    found = []
    for number, sample in enumerate(samples.collect(Optimized)):
        options = dict(sample.accepts) | {"rounding": "kahan", "state_dtype": torch.float32}
        torch.manual_seed(dist.get_world_size())
        model = Model(matrices(sample), torch.bfloat16)
        fully_shard(model)
        optimizer = sample.function(model.parameters(), **options)
        place = folder / str(number)
        if dist.get_world_size() == 4:
            run(model, optimizer, sample, range(2))
        else:
            run(model, optimizer, sample, range(7, 8))  # makes other states, to be overwritten
        states, options_ = get_state_dict(model, optimizer)
        held = {"model": states, "optimizer": options_}
        if dist.get_world_size() == 4:
            dcp.save(held, checkpoint_id=place)
        else:
            dcp.load(held, checkpoint_id=place)
            set_state_dict(
                model,
                optimizer,
                model_state_dict=held["model"],
                optim_state_dict=held["optimizer"],
            )
            found.append(results(model, optimizer))
            run(model, optimizer, sample, range(2, 4))
        found.append(results(model, optimizer))
    return found


def test_checkpoints_are_resharded(tmp_path: Path) -> None:
    """From four processes to two, with every state as it was and in its dtype."""
    saved, *_ = processes.run(partial(checkpointed, tmp_path), 4)
    for found in processes.run(partial(checkpointed, tmp_path), 2):
        numbers = iter(found)
        for sample, before in zip(samples.collect(Optimized), saved, strict=True):
            loaded, continued = next(numbers), next(numbers)
            for name, value in before.items():
                assert loaded[name].dtype == value.dtype, f"{sample.name} {name}"
                assert torch.equal(loaded[name], value), f"{sample.name} {name}"
            model = Model(matrices(sample), torch.bfloat16)
            options = dict(sample.accepts) | {"rounding": "kahan", "state_dtype": torch.float32}
            optimizer = sample.function(model.parameters(), **options)
            run(model, optimizer, sample, range(4))
            for name, value in results(model, optimizer).items():
                torch.testing.assert_close(continued[name], value, msg=f"{sample.name} {name}")
