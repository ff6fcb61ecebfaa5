"""The kernel that updates many tensors in one launch: in the interpreter, compiled, on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

pytest.importorskip("triton")

from tilework import _triton
from tilework.optim import AdamW, Lion
from tilework.optim._optimizer import rounding, step, triton, updates
from tilework.optim._optimizer.updates import Part, Way

import ahead_of_time
import processes
import samples
from helpers import dtype_name
from optim.samples import Optimized, assert_step_is_defined, draw_gradients

pytestmark = pytest.mark.untyped
interpreted = pytest.mark.skipif(not _triton.INTERPRETED, reason="on tensors of the CPU")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((0,), (1,), (7,), (3, 23), (), (0, 3))
CAPTURE = {"capturable": True, "maximize": True}


def with_kernel() -> list[Optimized]:
    """The optimizers that have one."""
    return [one for one in samples.collect(Optimized) if step._kernel_rule(one.function)]


def test_every_rule_belongs_to_an_optimizer() -> None:
    names = {step._kernel_rule(sample.function) for sample in with_kernel()}
    assert names == set(triton.RULES)


every_rule = pytest.mark.parametrize("sample", with_kernel(), ids=lambda one: one.name)


@contextmanager
def kernels_on_cpu() -> Iterator[list[tuple[str, int]]]:
    """Take the kernel's way with tensors of the CPU; note rules and numbers of tensors."""
    launched = []

    def launch(name: str, parts: Any, *arguments: Any) -> None:
        launched.append((name, len(parts)))
        original(name, parts, *arguments)

    original = triton.launch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "_KERNEL_DEVICES", ("cpu",))
        patch.setattr(triton, "launch", launch)
        yield launched


@pytest.fixture
def launched() -> Iterator[list[tuple[str, int]]]:
    with kernels_on_cpu() as found:
        yield found


@interpreted
@every_rule
@pytest.mark.parametrize("more", [{}, CAPTURE], ids=["numbers", "memory"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_a_step_is_the_definition(
    sample: Optimized, dtype: torch.dtype, more: dict[str, Any], launched: list[Any]
) -> None:
    for options in sample.options:
        for state_dtype in (None, torch.bfloat16):
            chosen = dict(sample.accepts) | options | more | {"state_dtype": state_dtype}
            optimizer = sample.function(sample.parameters(dtype, SHAPES), **chosen)
            for _ in range(2):
                draw_gradients(optimizer.param_groups[0]["params"])
                assert_step_is_defined(sample, optimizer)
    assert launched == [(step._kernel_rule(sample.function), len(SHAPES))] * len(launched)
    assert len(launched) == 4 * len(sample.options)


def exact(shape: tuple[int, ...]) -> Tensor:
    """Numbers of bfloat16 to which the steps of a test are added without rounding."""
    return torch.randint(-127, 128, shape).bfloat16() / 32


@interpreted
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("how", ["nearest", "stochastic", "kahan"])
def test_roundings_have_the_bits_of_other_ways(how: str, capturable: bool) -> None:
    """All that a step of Lion without decay does before it rounds is exact."""
    start = [exact(shape) for shape in SHAPES]
    runs = []
    options = {"rounding": how, "seed": 5 + 2**33, "capturable": capturable}
    for kernel in (False, True):
        optimizer = Lion([torch.nn.Parameter(p.clone()) for p in start], lr=2.0**-11, **options)
        parameters = optimizer.param_groups[0]["params"]
        torch.manual_seed(1)
        for some in (parameters[::2], parameters):  # whose numbers of steps differ then
            draw_gradients(some)
            if kernel:
                with kernels_on_cpu():
                    optimizer.step()
            else:
                optimizer.step()
        held = [p.detach() for p in parameters]
        if how == "kahan":
            held += [optimizer.state[p]["compensation"] for p in parameters]
        runs.append(held)
    for eager, fused in zip(*runs, strict=True):
        assert torch.equal(eager, fused)


def lion(parts: list[Part], places: list[int] | None = None, **way: Any) -> None:
    """A step of the rate 2 ** -11 by the launcher."""
    numbers = {"betas": (0.5, 0.5), "lr": 2.0**-11, "t": 7, "decay": None}
    how = Way(**({"maximize": False, "rounding": "nearest", "seed": 3} | way))
    triton.launch("lion", parts, places or [0] * len(parts), numbers, how)


def part_of(parameter: Tensor, gradient: Tensor, momentum: Tensor, position: int = 0) -> Part:
    return Part(parameter, gradient, {"exp_avg": momentum}, None, position)


@interpreted
def test_random_numbers_are_those_of_place_step_position_and_seed() -> None:
    values = exact((2, 100))
    parts = [
        part_of(row, torch.ones(100).bfloat16(), torch.zeros(100), 2**20 + index)
        for index, row in enumerate(values.clone())
    ]
    places = [2**32 - 50, 2**40]
    lion(parts, places, rounding="stochastic")
    for row, part, place in zip(values, parts, places, strict=True):
        index = torch.arange(100) + place
        expected = rounding.stochastic(row.float() - 2.0**-11, index, 7, part.position, 3)
        assert torch.equal(part.parameter, expected)


@interpreted
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 0.0])
def test_what_is_not_finite_stays_so(bad: float, launched: list[Any]) -> None:
    for kind in (AdamW, Lion):
        for how in ("nearest", "stochastic"):
            runs = []
            for foreach in (None, False):
                p = torch.nn.Parameter(torch.tensor([1.0, bad, 2.0]).bfloat16())
                optimizer = kind([p], rounding=how, foreach=foreach)
                p.grad = torch.tensor([bad, 1.0, 1.0]).bfloat16()
                optimizer.step()
                runs.append((p.detach(), *optimizer.state[p].values()))
            for one, other in zip(*runs, strict=True):
                torch.testing.assert_close(one, other, equal_nan=True)
    assert len(launched) == 4


@interpreted
@pytest.mark.parametrize("programs", [1, 64])
@pytest.mark.parametrize("offset", [0, 3])
def test_nothing_beside_the_tensors_changes(
    offset: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of views in the middle of memory, which begin at multiples of 16 bytes there, or not."""
    monkeypatch.setattr(triton, "PROGRAMS", programs)  # one: that they compute several blocks
    sizes = (1, 7, 1000, 16, 4097, 64)
    guarded = []
    parts = []
    for size in sizes:
        buffers = [torch.arange(size + 64, dtype=torch.float32) for _ in range(3)]
        views = [buffer[16 + offset : 16 + offset + size] for buffer in buffers]
        views[1].fill_(1.0)
        guarded.append((buffers, [buffer.clone() for buffer in buffers], size))
        parts.append(part_of(*views))
    lion(parts)
    for buffers, before, size in guarded:
        inside = slice(16 + offset, 16 + offset + size)
        parameter, gradient, momentum = (buffer[inside].clone() for buffer in before)
        before[0][inside] = parameter - 2.0**-11
        before[2][inside] = (momentum + gradient) / 2
        for now, expected in zip(buffers, before, strict=True):
            assert torch.equal(now, expected)


@interpreted
def test_offsets_have_64_bits() -> None:
    """As the last program of a tensor of 2 ** 33 elements sees it, of which only those exist."""
    tile = triton.TILES.choose("interpreter")
    last = 2**33 // tile.block
    held = [torch.ones(13), torch.ones(13), torch.zeros(13)]
    addresses = [tensor.data_ptr() - 4 * last * tile.block for tensor in held]
    table = torch.tensor([-last, last * tile.block + 13, 0, 0, *addresses])
    triton.step_kernel[(1,)](
        table,
        (0.5, 0.5, 0.25, 0.0),
        None,
        1,
        1,
        1,
        0,
        RULE=triton.lion,
        DTYPES=(triton.tl.float32,) * 3,
        COUNT=0,
        DECAYS=False,
        MAXIMIZE=False,
        ROUNDING="nearest",
        BLOCK=tile.block,
    )
    for tensor, value in zip(held, (0.75, 1.0, 0.5), strict=True):
        assert torch.equal(tensor, torch.full((13,), value))


@interpreted
@every_rule
def test_layouts(sample: Optimized, launched: list[Any]) -> None:
    """What is not dense goes another way; its gradient may lie otherwise."""
    for how in ("nearest", "stochastic"):
        dense, sliced = torch.randn(4, 6), torch.randn(4, 12)[:, ::2]
        parameters = [torch.nn.Parameter(p) for p in (dense, dense.mT.contiguous().mT, sliced)]
        options = dict(sample.accepts) | {"rounding": how}
        optimizer = sample.function(parameters, **options)
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = torch.randn(6).expand_as(parameter)
            parameters[0].grad = torch._neg_view(torch.randn(4, 6))
            assert_step_is_defined(sample, optimizer)
    assert {count for _, count in launched} == {2}


@interpreted
def test_places_of_transposed_parameters_are_not_those_in_memory(launched: list[Any]) -> None:
    """So stochastic rounding takes another way there, with its bits."""
    start = exact((5, 7))
    runs = []
    for foreach in (None, False):
        parameters = [
            torch.nn.Parameter(start.mT.contiguous().mT),
            torch.nn.Parameter(start.clone()),
        ]
        optimizer = Lion(parameters, lr=2.0**-11, rounding="stochastic", foreach=foreach)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        runs.append(parameters)
    assert launched == [("lion", 1)]
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


@interpreted
def test_complex_parameters(launched: list[Any]) -> None:
    start = torch.randn(3, 5, dtype=torch.complex64)
    gradient = torch.randn_like(start)
    runs = []
    for foreach in (None, False):
        parameter = torch.nn.Parameter(start.clone())
        parameter.grad = gradient.conj()
        AdamW([parameter], lr=0.1, foreach=foreach).step()
        runs.append(parameter.detach())
    assert launched == [("adamw", 1)]
    torch.testing.assert_close(*runs)


@interpreted
@pytest.mark.parametrize("capturable", [False, True])
def test_a_launch_for_each_number_of_steps(capturable: bool, launched: list[Any]) -> None:
    """In memory, each tensor has numbers of its own, and one launch is enough."""
    runs = []
    for foreach in (None, False):
        torch.manual_seed(1)
        parameters = [torch.nn.Parameter(torch.randn(50)) for _ in range(3)]
        optimizer = AdamW(parameters, lr=0.1, capturable=capturable, foreach=foreach)
        draw_gradients(parameters[:1])
        optimizer.step()
        draw_gradients(parameters)
        optimizer.step()
        runs.append([p.detach() for p in parameters])
    late = [("adamw", 3)] if capturable else [("adamw", 1), ("adamw", 2)]
    assert launched == [("adamw", 1), *late]
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other)


@interpreted
def test_a_rate_in_memory_does_not_need_capturing(
    launched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a tensor on a device is, which the step does not wait for."""
    monkeypatch.setattr(step._checks, "holds_values", lambda tensor: False)
    results = []
    for lr in (0.1, torch.tensor(0.1)):
        parameter = torch.nn.Parameter(torch.ones(40))
        parameter.grad = torch.ones(40)
        AdamW([parameter], lr=lr).step()
        results.append(parameter.detach())
    assert launched == [("adamw", 1)] * 2
    torch.testing.assert_close(*results)


class Changed(Lion):
    """Has another rule than that from which it is made."""

    @staticmethod
    def _update(p: Tensor, g: Tensor, state: dict[str, Tensor], group: Any) -> Tensor:
        return p - g


def test_the_kernel_is_for_its_own_rule_alone(launched: list[Any]) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.full((3,), 0.25)
    Changed([parameter]).step()
    assert torch.equal(parameter, torch.full((3,), 0.75))
    assert not launched


@pytest.mark.parametrize("foreach", [False, True])
def test_another_way_may_be_asked_for(foreach: bool, launched: list[Any]) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    Lion([parameter], foreach=foreach).step()
    assert not launched


def test_without_triton_all_is_as_on_other_devices(
    launched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "_has_triton", lambda: False)
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    Lion([parameter]).step()
    assert not launched


@interpreted
def test_autograd_sees_that_parameters_change(launched: list[Any]) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    loss = (parameter * parameter).sum()
    parameter.grad = torch.ones(3)
    Lion([parameter]).step()
    assert launched
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_table_is_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def pinned(numbers: tuple[int, ...]) -> Tensor:
        made.append(numbers)
        return torch.tensor(numbers)

    monkeypatch.setattr(triton, "_pinned", pinned)
    triton._kept.cache_clear()
    device = torch.device("cpu")
    first, again, stream, moved = (
        triton._kept(device, *key) for key in ((0, (1, 2)), (0, (1, 2)), (1, (1, 2)), (0, (1, 3)))
    )
    triton._kept.cache_clear()
    assert first is again
    assert stream is not first  # which does not wait for the copy
    assert moved.tolist() == [1, 3]
    assert made == [(1, 2), (1, 2), (1, 3)]


PLACEMENTS = ((Shard(0), Shard(0)), (Shard(1), Shard(0)), (Shard(1), Shard(2)), (Shard(2),) * 2)
GLOBAL = ((5, 4, 3), (1, 6, 2), (3, 1, 9))


def sharded() -> list[Any]:
    """Steps of shards, and whether the first places are those of all places."""
    found: list[Any] = []
    mesh = init_device_mesh("cpu", (2, 2))
    for shape in GLOBAL:
        for placements in PLACEMENTS:
            torch.manual_seed(0)
            start = exact(shape)
            parameter = torch.nn.Parameter(distribute_tensor(start, mesh, placements))
            parameter.grad = distribute_tensor(torch.ones_like(start), mesh, placements)
            places = updates.places_of(parameter).reshape(-1)
            first = updates.first_place(parameter)
            count = len(places)
            if count:
                in_order = torch.equal(places, places[0] + torch.arange(count))
                assert first == (int(places[0]) if in_order else None)
            with kernels_on_cpu() as launched:
                Lion([parameter], lr=2.0**-11, rounding="stochastic").step()
            assert len(launched) == (first is not None)
            found.append(parameter.full_tensor().detach())  # type: ignore[attr-defined]
    return found


@interpreted
def test_shards_are_as_the_whole() -> None:
    for found in processes.run(sharded, 4):
        numbers = iter(found)
        for shape in GLOBAL:
            torch.manual_seed(0)
            parameter = torch.nn.Parameter(exact(shape))
            parameter.grad = torch.ones_like(parameter)
            Lion([parameter], lr=2.0**-11, rounding="stochastic").step()
            for _ in PLACEMENTS:
                assert torch.equal(next(numbers), parameter)


def test_the_kernel_compiles_for_every_architecture() -> None:
    reports = ahead_of_time.compiled(Path(__file__).with_name("launches.py"))
    assert {report["arch"] for report in reports} == set(ahead_of_time.SHARED_MEMORY)
    for report in reports:
        assert report["kernel"] == "step_kernel"
        assert report["spilled"] == 0, report
        assert report["shared"] == 0, report  # no value passes from thread to thread
        # Loads of 16 bytes: of all states in float32, and of the others where these are too.
        launch = report["launch"]
        states = 3 if "amsgrad" in launch else 1 if "lion" in launch else 2
        if "float32" in launch:
            assert report["wide loads"] >= 2 + states, report
        elif "state_dtype" not in launch:
            assert report["wide loads"] >= states, report


@pytest.mark.gpu
@every_rule
@pytest.mark.parametrize("how", ["nearest", "stochastic", "kahan"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_on_a_gpu(sample: Optimized, dtype: torch.dtype, how: str) -> None:
    """Real sizes, as other ways compute them; one tensor begins within 16 bytes."""
    if dtype == torch.float16 and how != "nearest":
        pytest.skip("of bfloat16 and float32")
    sizes = (1, 7, 1000, 4097, 2**20 + 3, 50257 * 64)
    start = [torch.randn(size, device="cuda").to(dtype) for size in sizes]
    start.append(torch.randn(100_001, device="cuda").to(dtype)[1:])
    for options in sample.options:
        for capturable in (False, True):
            runs = []
            for foreach in (None, False):
                torch.manual_seed(1)
                chosen = {"rounding": how, "capturable": capturable, "foreach": foreach}
                parameters = [torch.nn.Parameter(p.clone()) for p in start[:-1]]
                parameters.append(torch.nn.Parameter(start[-1]))
                if foreach is None:
                    start[-1] = start[-1].clone()
                optimizer = sample.function(parameters, **(dict(sample.accepts) | options | chosen))
                for _ in range(3):
                    for parameter in parameters:
                        parameter.grad = torch.randn_like(parameter)
                    optimizer.step()
                runs.append([p.detach() for p in parameters])
            for fused, other in zip(*runs, strict=True):
                eps = torch.finfo(dtype).eps
                torch.testing.assert_close(fused, other, rtol=4 * eps, atol=4 * eps)


@pytest.mark.gpu
def test_a_graph_takes_new_numbers() -> None:
    """Bias corrections and a rate in memory, at each replay; gradients move between."""
    runs = []
    for graphed in (False, True):
        torch.manual_seed(1)
        parameters = [torch.nn.Parameter(torch.randn(n, device="cuda")) for n in (5, 5000)]
        lr = torch.tensor(0.1, device="cuda")
        optimizer = AdamW(parameters, lr=lr, capturable=True)
        gradients = torch.randn(6, 5005, device="cuda")
        held = torch.zeros(5005, device="cuda")
        for parameter, gradient in zip(parameters, held.split((5, 5000)), strict=True):
            parameter.grad = gradient
        graph = torch.cuda.CUDAGraph()
        for index, gradient in enumerate(gradients):
            held.copy_(gradient)
            lr.fill_(0.1 / (index + 1))
            if graphed and index >= 3:
                if index == 3:
                    with torch.cuda.graph(graph):
                        optimizer.step()
                graph.replay()
            else:
                optimizer.step()
        runs.append([p.detach() for p in parameters])
    for eager, replayed in zip(*runs, strict=True):
        assert torch.equal(eager, replayed)


@pytest.mark.gpu
def test_more_elements_than_32_bits_count() -> None:
    size = 2**31 + 100
    parameter = torch.nn.Parameter(torch.ones(size, dtype=torch.bfloat16, device="cuda"))
    parameter.grad = torch.ones_like(parameter)
    Lion([parameter], lr=0.5, state_dtype=torch.bfloat16).step()
    assert bool((parameter == 0.5).all())
