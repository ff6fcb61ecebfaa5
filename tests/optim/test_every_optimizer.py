"""What every optimizer keeps, whatever its rule is."""

import copy
import dataclasses
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tilework.optim import step_in_backward
from tilework.optim._optimizer import updates

import samples
from helpers import Memory, dtype_name
from optim.samples import LOSS, Optimized, assert_step_is_defined, draw_gradients

every_optimizer = samples.every(Optimized)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def options_of(sample: Optimized) -> list[dict[str, Any]]:
    return [dict(sample.accepts) | options for options in sample.options]


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def values(optimizer: Any) -> list[Tensor]:
    """Parameters and states, in order."""
    found = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found.append(parameter.detach())
            state = optimizer.state[parameter]
            found += [state[name] for name in sorted(state)]
    return found


def assert_same(one: list[Tensor], other: list[Tensor], rtol: float = 0) -> None:
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        assert left.dtype == right.dtype
        torch.testing.assert_close(left, right, rtol=rtol, atol=rtol, equal_nan=True)


def twins(sample: Optimized, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any]:
    """Two optimizers of equal parameters."""
    parameters = sample.parameters(dtype)
    return tuple(
        sample.function([torch.nn.Parameter(p.detach().clone()) for p in parameters], **options)
        for _ in range(2)
    )


def give_gradients(*optimizers: Any, scale: float = 1.0) -> None:
    """The same random gradients to all."""
    for same in zip(*(every_parameter(optimizer) for optimizer in optimizers), strict=True):
        gradient = torch.randn(same[0].shape, dtype=torch.float64)
        for parameter in same:
            parameter.grad = (scale * gradient).to(parameter.dtype)


def every_parameter(optimizer: Any) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def assign(optimizer: Any, **options: Any) -> None:
    for group in optimizer.param_groups:
        group.update(options)


FLAGS = [
    {"foreach": foreach, "capturable": capturable, "maximize": maximize}
    for foreach, capturable, maximize in itertools.product(
        (None, False, True), (False, True), (False, True)
    )
]


@every_optimizer
@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: "-".join(map(str, flags.values())))
def test_every_way_is_the_definition(sample: Optimized, flags: dict[str, Any]) -> None:
    for options in options_of(sample):
        known = sample.function(sample.parameters(), **options).defaults
        chosen = {name: value for name, value in flags.items() if name in known}
        optimizer = sample.function(sample.parameters(), **(options | chosen))
        for _ in range(3):
            draw_gradients(every_parameter(optimizer))
            assert_step_is_defined(sample, optimizer)


@every_optimizer
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_every_dtype_is_the_definition(sample: Optimized, dtype: torch.dtype) -> None:
    for options in options_of(sample):
        for state_dtype in (None, torch.bfloat16):
            optimizer = sample.function(
                sample.parameters(dtype), **(options | {"state_dtype": state_dtype})
            )
            for _ in range(3):
                draw_gradients(every_parameter(optimizer))
                assert_step_is_defined(sample, optimizer)


@every_optimizer
def test_layouts(sample: Optimized) -> None:
    """Transposed and sliced parameters, and expanded gradients, are as any others."""
    shapes = [shape for shape in sample.shapes if len(shape) >= 2] or [(3, 5)]
    for options in options_of(sample):
        bases = [torch.randn(*shape[:-1], 2 * shape[-1]) for shape in shapes]
        parameters = [torch.nn.Parameter(base[..., ::2]) for base in bases]
        parameters += [
            torch.nn.Parameter(torch.randn(shape).mT.contiguous().mT) for shape in shapes
        ]
        assert not any(p.is_contiguous() for p in parameters if p.numel())
        optimizer = sample.function(parameters, **options)
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape[-1]).expand_as(parameter)
            assert_step_is_defined(sample, optimizer)


@every_optimizer
def test_large_tensors_are_cut(sample: Optimized, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updates, "CPU", updates.Sizes(4, 8, 5))
    for options in options_of(sample):
        optimizer = sample.function(sample.parameters(), **options)
        for _ in range(2):
            draw_gradients(every_parameter(optimizer))
            assert_step_is_defined(sample, optimizer)


@every_optimizer
def test_maximizing_is_minimizing_the_opposite(sample: Optimized) -> None:
    for options in options_of(sample):
        up, down = twins(sample, **options)
        if "maximize" not in up.defaults:
            continue
        assign(up, maximize=True)
        for _ in range(3):
            give_gradients(up, down)
            for parameter in every_parameter(down):
                parameter.grad = -parameter.grad  # type: ignore[operator]
            sample.step(up)
            sample.step(down)
            assert_same(values(up), values(down))


@every_optimizer
def test_gradients_are_left_alone(sample: Optimized) -> None:
    for options in options_of(sample):
        optimizer = sample.function(sample.parameters(), **options)
        if "maximize" in optimizer.defaults:
            assign(optimizer, maximize=True)
        for _ in range(3):
            draw_gradients(every_parameter(optimizer))
            gradients = [p.grad for p in every_parameter(optimizer)]
            copies = [gradient.clone() for gradient in gradients if gradient is not None]
            sample.step(optimizer)
            assert all(
                p.grad is gradient
                for p, gradient in zip(every_parameter(optimizer), gradients, strict=True)
            )
            assert_same([p.grad for p in every_parameter(optimizer)], copies)  # type: ignore[misc]


@every_optimizer
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
def test_resumes_from_a_file(sample: Optimized, rounding: str) -> None:
    """Bitwise, with every option and every state's dtype, whatever it is constructed with."""
    dtype = torch.float32 if rounding == "nearest" else torch.bfloat16
    for options in options_of(sample):
        options |= {"rounding": rounding, "seed": 3, "state_dtype": torch.float32}
        whole, _ = twins(sample, dtype, **options)
        for _ in range(2):
            give_gradients(whole)
            sample.step(whole)
        saved = through_a_file(whole.state_dict())
        other = dict(sample.accepts) | {"state_dtype": torch.float64}
        parameters = [torch.nn.Parameter(p.detach().clone()) for p in every_parameter(whole)]
        resumed = sample.function(parameters, **other)
        resumed.load_state_dict(saved)
        for name in whole.defaults:
            assert resumed.param_groups[0][name] == whole.param_groups[0][name]
        for _ in range(2):
            give_gradients(whole, resumed)
            sample.step(whole)
            sample.step(resumed)
            assert_same(values(whole), values(resumed))


@every_optimizer
def test_older_checkpoints(sample: Optimized) -> None:
    """Of versions with fewer options, and with counters that are numbers."""
    for options in options_of(sample):
        old, new = twins(sample, **options)
        give_gradients(old, new)
        sample.step(old)
        sample.step(new)
        saved = copy.deepcopy(old.state_dict())
        for name in ("rounding", "seed", "compiled", "capturable"):
            for group in saved["param_groups"]:
                del group[name]
        saved["state"] = {
            key: state | {"step": int(state["step"])} for key, state in saved["state"].items()
        }
        new.load_state_dict(saved)
        assert new.param_groups[0]["rounding"] == "nearest"
        give_gradients(old, new)
        sample.step(old)
        sample.step(new)
        assert_same(values(old), values(new))


@every_optimizer
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_go_on(sample: Optimized, copied: Callable[[Any], Any]) -> None:
    for options in options_of(sample):
        first = sample.function(sample.parameters(), **options)
        give_gradients(first)
        sample.step(first)
        second = copied(first)
        assert second.defaults == first.defaults
        give_gradients(first, second)
        sample.step(first)
        sample.step(second)
        assert_same(values(first), values(second))


@every_optimizer
def test_late_parameters_are_as_if_alone(sample: Optimized) -> None:
    if sample.together:
        pytest.skip("one parameter's step depends on the others'")
    for options in options_of(sample):
        parameters = sample.parameters()
        late, *early = parameters
        added = torch.nn.Parameter(late.detach().clone())
        alone = torch.nn.Parameter(late.detach().clone())
        optimizer = sample.function([late, *early], **options)
        draw_gradients(early)
        for _ in range(2):
            sample.step(optimizer)
        assert torch.equal(late, alone)
        assert not optimizer.state.get(late)
        optimizer.add_param_group({"params": added})
        single = sample.function([alone], **options)
        for _ in range(3):
            draw_gradients([late])
            added.grad = alone.grad = late.grad
            sample.step(optimizer)
            sample.step(single)
            assert torch.equal(late, alone)
            assert torch.equal(added, alone)


@every_optimizer
def test_groups_have_options_of_their_own(sample: Optimized) -> None:
    if sample.together or not sample.takes_groups:
        pytest.skip("one parameter's step depends on the others'")
    base = dict(sample.accepts)
    for options in options_of(sample):
        parameters = sample.parameters()
        copies = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
        grouped = sample.function(
            [{"params": parameters[:2]}, {"params": parameters[2:], **options}], **base
        )
        parts = [sample.function(copies[:2], **base), sample.function(copies[2:], **options)]
        for _ in range(2):
            draw_gradients(parameters)
            for parameter, twin in zip(parameters, copies, strict=True):
                twin.grad = parameter.grad
            for optimizer in (grouped, *parts):
                sample.step(optimizer)
            assert_same([p.detach() for p in parameters], [p.detach() for p in copies])


@every_optimizer
def test_names_and_generators_are_accepted(sample: Optimized) -> None:
    if not sample.takes_groups:
        pytest.skip("its groups are of its own making")
    parameters = sample.parameters()
    named = [(f"p{index}", p) for index, p in enumerate(parameters)]
    optimizer = sample.function(iter(named), **sample.accepts)
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in named]
    draw_gradients(parameters)
    sample.step(optimizer)
    groups = [{"params": iter(parameters), "name": "all", "initial_lr": 1.0}]
    assert sample.function(groups, **sample.accepts).param_groups[0]["params"] == parameters
    assert "params" in groups[0]


@every_optimizer
def test_a_closure_is_called_once_with_gradients(sample: Optimized) -> None:
    plain, closed = twins(sample, **sample.accepts)
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        closed.zero_grad()
        loss = sum((p.square().sum() for p in every_parameter(closed)), torch.zeros(()))
        loss.backward()
        return loss

    with torch.no_grad():
        result = closed.step(closure)
    assert calls == [True]
    loss = sum((p.square().sum() for p in every_parameter(plain)), torch.zeros(()))
    loss.backward()
    plain.step(**({"loss": loss.detach()} if sample.takes_loss else {}))
    assert torch.equal(result, loss)
    assert_same(values(plain), values(closed))


@every_optimizer
def test_nothing_without_gradients(sample: Optimized) -> None:
    optimizer = sample.function(sample.parameters(), **sample.accepts)
    before = [p.detach().clone() for p in every_parameter(optimizer)]
    sample.step(optimizer)
    assert_same([p.detach() for p in every_parameter(optimizer)], before)
    assert not optimizer.state


@every_optimizer
@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_rounding_is_of_bfloat16_alone(sample: Optimized, rounding: str) -> None:
    plain, other = twins(sample, **sample.accepts)
    assign(other, rounding=rounding)
    for _ in range(2):
        give_gradients(plain, other)
        sample.step(plain)
        sample.step(other)
        assert_same(values(plain), values(other))


def in_float32(sample: Optimized, narrow: Any) -> Any:
    """What the same rule does, by no operator of PyTorch's that rounds otherwise."""
    parameters = [torch.nn.Parameter(p.detach().float()) for p in every_parameter(narrow)]
    return sample.function(parameters, **(sample.accepts | {"foreach": False}))


def by_random123(counter: list[int], key: list[int]) -> int:
    """Philox4x32-10 on unsigned integers, after the paper of the Random123 library."""
    words, keys = [np.uint64(word) for word in counter], list(key)
    for _ in range(10):
        first, second = np.uint64(0xD2511F53) * words[0], np.uint64(0xCD9E8D57) * words[2]
        half, mask = np.uint64(32), np.uint64(0xFFFFFFFF)
        words = [
            (second >> half) ^ words[1] ^ np.uint64(keys[0]),
            second & mask,
            (first >> half) ^ words[3] ^ np.uint64(keys[1]),
            first & mask,
        ]
        keys = [(keys[0] + 0x9E3779B9) % 2**32, (keys[1] + 0xBB67AE85) % 2**32]
    return int(words[0])


@every_optimizer
@pytest.mark.parametrize("foreach", [None, False])
def test_stochastic_rounding_is_that_of_the_counter(
    sample: Optimized, foreach: bool | None
) -> None:
    """The same numbers, whatever computes them: those of element, step, position and seed."""
    seed = 5 + 2**33
    narrow = sample.function(
        sample.parameters(torch.bfloat16),
        **(sample.accepts | {"rounding": "stochastic", "seed": seed, "foreach": foreach}),
    )
    exact = in_float32(sample, narrow)
    for t in (1, 2):
        give_gradients(narrow)
        for parameter, twin in zip(every_parameter(narrow), every_parameter(exact), strict=True):
            twin.data.copy_(parameter.detach())
            twin.grad = parameter.grad.float()  # type: ignore[union-attr]
        sample.step(narrow)
        sample.step(exact)
        for k, (parameter, twin) in enumerate(
            zip(every_parameter(narrow), every_parameter(exact), strict=True)
        ):
            bits = twin.detach().numpy().reshape(-1).view(np.uint32)
            drawn = [
                by_random123([i, 0, t, k], [seed % 2**32, seed // 2**32]) for i in range(len(bits))
            ]
            low = np.array([number & 0xFFFF for number in drawn], dtype=np.uint32)
            expected = ((bits + low) & np.uint32(0xFFFF0000)).view(np.float32)
            assert np.array_equal(parameter.detach().float().numpy().reshape(-1), expected)


@every_optimizer
def test_kahan_keeps_what_rounding_takes(sample: Optimized) -> None:
    narrow = sample.function(
        sample.parameters(torch.bfloat16), **(sample.accepts | {"rounding": "kahan"})
    )
    exact = in_float32(sample, narrow)
    kept = [torch.zeros(p.shape) for p in every_parameter(narrow)]
    for _ in range(3):
        give_gradients(narrow)
        olds = [p.detach().float() for p in every_parameter(narrow)]
        for parameter, twin in zip(every_parameter(narrow), every_parameter(exact), strict=True):
            twin.data.copy_(parameter.detach())
            twin.grad = parameter.grad.float()  # type: ignore[union-attr]
        sample.step(narrow)
        sample.step(exact)
        for k, (parameter, twin) in enumerate(
            zip(every_parameter(narrow), every_parameter(exact), strict=True)
        ):
            change = (twin.detach() - olds[k]) + kept[k]
            stored = (olds[k] + change).bfloat16()
            kept[k] = (change - (stored.float() - olds[k])).bfloat16().float()
            assert torch.equal(parameter.detach(), stored)
            compensation = narrow.state[parameter]["compensation"]
            assert compensation.dtype == torch.bfloat16
            assert torch.equal(compensation.float(), kept[k])


@every_optimizer
def test_rates_may_be_tensors_and_numbers(sample: Optimized) -> None:
    rates = (0.1, np.float32(0.05), torch.tensor(0.05), torch.tensor([0.05]), 1)
    if "lr" not in sample.function(sample.parameters(), **sample.accepts).defaults:
        pytest.skip("has no learning rate")
    for rate in rates[1:]:
        plain, other = twins(sample, **sample.accepts)
        for one in (rates[0], rate):
            assign(plain, lr=float(one))
            assign(other, lr=one)
            give_gradients(plain, other)
            sample.step(plain)
            sample.step(other)
            assert_same(values(plain), values(other))


@every_optimizer
def test_schedulers_drive_it(sample: Optimized) -> None:
    optimizer = sample.function(sample.parameters(), **sample.accepts)
    if not optimizer.defaults.get("lr"):
        pytest.skip("has no learning rate")
    base = float(optimizer.defaults["lr"])
    schedulers = torch.optim.lr_scheduler
    halves = schedulers.LambdaLR(optimizer, lambda step: 0.5**step)
    for step in range(3):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(base * 0.5**step)
        draw_gradients(every_parameter(optimizer))
        assert_step_is_defined(sample, optimizer)
        halves.step()
    cycles = bool(optimizer.defaults.get("betas") or optimizer.defaults.get("momentum"))
    cycle = schedulers.OneCycleLR(optimizer, 0.1, total_steps=4, cycle_momentum=cycles)
    for _ in range(3):
        draw_gradients(every_parameter(optimizer))
        assert_step_is_defined(sample, optimizer)
        cycle.step()
    plateau = schedulers.ReduceLROnPlateau(optimizer, patience=0)
    plateau.step(1.0)
    plateau.step(2.0)
    draw_gradients(every_parameter(optimizer))
    assert_step_is_defined(sample, optimizer)


@every_optimizer
def test_scaled_and_clipped_gradients(sample: Optimized) -> None:
    plain, scaled = twins(sample, **sample.accepts)
    if sample.takes_loss:
        pytest.skip("GradScaler passes no loss")
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    give_gradients(plain, scaled)
    scaler.scale(torch.zeros(()))  # makes its state
    for parameter in every_parameter(scaled):
        parameter.grad *= 8  # type: ignore[operator]
    torch.nn.utils.clip_grad_norm_(every_parameter(plain), 0.5)
    scaler.unscale_(scaled)
    torch.nn.utils.clip_grad_norm_(every_parameter(scaled), 0.5)
    plain.step()
    scaler.step(scaled)
    scaler.update()
    assert_same(values(plain), values(scaled))


@every_optimizer
@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_in_the_backward_pass(sample: Optimized, accumulate: int) -> None:
    rtol = 0 if sample.rounds_alike else 4e-7
    for options in options_of(sample):
        late, early = twins(sample, **options)
        if sample.together:
            with pytest.raises(ValueError, match="step_in_backward: optimizer must update each"):
                step_in_backward(early)
            continue
        handle = step_in_backward(early, accumulate=accumulate)
        for _ in range(2):
            for _ in range(accumulate):
                factors = [torch.randn(p.shape) for p in every_parameter(late)]
                for optimizer in (late, early):
                    parameters = every_parameter(optimizer)
                    pairs = zip(factors, parameters, strict=True)
                    sum((f * p).sum() for f, p in pairs).backward()  # type: ignore[union-attr]
                    if optimizer is early:
                        early.step()
                        early.zero_grad()
            assert all(p.grad is None for p in every_parameter(early))
            late.step()
            late.zero_grad()
            assert_same(values(late), values(early), rtol)
        handle.remove()
        give_gradients(late, early)
        late.step()
        early.step()
        assert_same(values(late), values(early), rtol)


@every_optimizer
def test_complex_parameters_are_pairs(sample: Optimized) -> None:
    complex_ = torch.nn.Parameter(torch.randn(3, 5, dtype=torch.complex64))
    for options in options_of(sample):
        if not sample.is_complex:
            with pytest.raises(TypeError, match=f"^{sample.name}: params must be real"):
                sample.function([complex_], **options)
            continue
        pair = torch.nn.Parameter(torch.view_as_real(complex_.detach()).clone())
        whole, parts = sample.function([complex_], **options), sample.function([pair], **options)
        for _ in range(3):
            complex_.grad = torch.randn(3, 5, dtype=torch.complex64)
            pair.grad = torch.view_as_real(complex_.grad)
            whole.step()
            parts.step()
            torch.testing.assert_close(torch.view_as_real(complex_.detach()), pair.detach())
        assert all(
            state.is_complex() for name, state in whole.state[complex_].items() if name != "step"
        )
        with pytest.raises(ValueError, match="params must not be lazily conjugated"):
            sample.function([torch.nn.Parameter(complex_.detach().conj())], **options)
        with pytest.raises(ValueError, match="state_dtype must be None for complex"):
            sample.function([complex_], **(options | {"state_dtype": torch.float32}))


@pytest.mark.untyped
@every_optimizer
def test_capturing_needs_no_values(sample: Optimized) -> None:
    """A step reads nothing from the device, where it would wait for it."""
    from torch._subclasses import FakeTensorMode

    for options in options_of(sample):
        with FakeTensorMode():
            optimizer = sample.function(sample.parameters(), **(options | {"capturable": True}))
            for _ in range(2):
                for parameter in every_parameter(optimizer):
                    parameter.grad = torch.empty_like(parameter)
                sample.step(optimizer)


@pytest.mark.untyped
@samples.every(Optimized, lambda sample: sample.elementwise and not sample.together)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_memory_of_a_step_is_that_of_blocks(
    sample: Optimized, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However large and many the parameters are; states are made before."""
    block = 1000
    monkeypatch.setattr(updates, "CPU", updates.Sizes(100, block, block))
    for options in options_of(sample):
        many = [(4 * block,), (2 * block + 1,), *[(99,)] * 30]
        parameters = sample.parameters(dtype, many)
        optimizer = sample.function(parameters, **options)
        draw_gradients(parameters)
        sample.step(optimizer)
        held = [tensor for p in parameters for tensor in (p.detach(), p.grad)]
        held += [state for p in parameters for state in optimizer.state[p].values()]
        with Memory(*held) as memory:  # type: ignore[arg-type]
            sample.step(optimizer)
        assert memory.peak <= 12 * 4 * block


@pytest.mark.untyped
@every_optimizer
def test_compiled_steps(sample: Optimized, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph, whatever the rate and the number of the step, for ``compiled`` and ``step``."""
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    few = dataclasses.replace(sample, shapes=sample.shapes[:2])  # each may take a graph
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **kwargs: compile_(f, backend=backend, **kwargs)
    )
    updates.compiled.cache_clear()
    try:
        every = options_of(sample)
        for options, outside in [(every[0], True), *((one, False) for one in every)]:
            torch._dynamo.reset()
            plain, other = twins(few, **options)
            step = compile_(other.step, backend=backend) if outside else other.step
            if not outside:
                assign(other, compiled=True)
            for count in range(5):
                for optimizer in (plain, other):
                    if optimizer.defaults.get("lr"):
                        assign(optimizer, lr=0.1 / (count + 1))
                give_gradients(plain, other)
                sample.step(plain)
                step(**({"loss": torch.tensor(LOSS)} if sample.takes_loss else {}))
                for one, two in zip(values(plain), values(other), strict=True):
                    torch.testing.assert_close(one, two)
                if count == 2:
                    graphs.clear()
            assert not graphs
    finally:
        updates.compiled.cache_clear()


@pytest.mark.untyped
@samples.every_refusal(Optimized)
def test_refuses(sample: Optimized, refusal: samples.Refusal) -> None:
    sample.check_refusal(refusal)


def common_refusals(sample: Optimized) -> samples.Refusals:
    """Errors in what all optimizers have, or what several have under one name."""
    known = sample.function(sample.parameters(), **sample.accepts).defaults
    lr = ("lr must be a number of at least 0 or a tensor of one element", ValueError)
    cases = [
        ("lr", (*lr, {"lr": -0.1})),
        ("lr", (*lr, {"lr": float("nan")})),
        ("lr", (*lr, {"lr": torch.ones(2)})),
        ("lr", ("lr must be a number", TypeError, {"lr": "0.1"})),
        ("weight_decay", ("weight_decay must be", ValueError, {"weight_decay": -1.0})),
        ("rounding", ("rounding must be one of 'nearest'", ValueError, {"rounding": "up"})),
        ("seed", ("seed must be an int of at least 0", ValueError, {"seed": -1})),
        ("foreach", ("foreach must be True or False", TypeError, {"foreach": 1})),
        ("maximize", ("maximize must be True or False", TypeError, {"maximize": "no"})),
        ("state_dtype", ("state_dtype must be a floating", TypeError, {"state_dtype": torch.int8})),
        (
            "compiled",
            ("foreach must be None or False", ValueError, {"compiled": True, "foreach": True}),
        ),
    ]
    if isinstance(known.get("eps"), float):
        cases.append(("eps", ("eps must be", ValueError, {"eps": -1e-8})))
    if isinstance(known.get("momentum"), float):
        for momentum in (1.0, -0.1):
            cases.append(("momentum", ("momentum must be", ValueError, {"momentum": momentum})))
    if len(known.get("betas") or ()) == 2:
        for betas in ((1.0, 0.9), (0.9, -0.1)):
            cases.append(("betas", (r"betas\[[01]\] must be", ValueError, {"betas": betas})))
        cases.append(("betas", ("betas must be two numbers", ValueError, {"betas": (0.9,)})))
    return tuple(case for name, case in cases if name in known)


@pytest.mark.untyped
@every_optimizer
def test_refuses_what_all_refuse(sample: Optimized) -> None:
    for refusal in common_refusals(sample):
        sample.check_refusal(refusal)
    accepts = sample.accepts
    with pytest.raises(TypeError, match="unexpected keyword argument 'rate'"):
        sample.function(sample.parameters(), **accepts, rate=0.1)
    with pytest.raises(ValueError, match=f"{sample.name}: a group must have no keys but .*'rate'"):
        sample.function([{"params": sample.parameters(), "rate": 0.1}], **accepts)
    with pytest.raises(ValueError, match=f"{sample.name}: params must be leaf tensors"):
        sample.function([sample.parameters()[0] * 2], **accepts)
    with pytest.raises(TypeError, match=f"{sample.name}: params must be tensors, got 'p'"):
        sample.function(["p"], **accepts)
    integers = torch.zeros(sample.shapes[0], dtype=torch.int64)
    with pytest.raises(TypeError, match=f"{sample.name}: params must be of floating dtypes"):
        sample.function([integers], **accepts)
    for rounding in ("stochastic", "kahan"):
        with pytest.raises(ValueError, match="rounding must be 'nearest' for float16 parameters"):
            sample.function(sample.parameters(torch.float16), **(accepts | {"rounding": rounding}))
    optimizer = sample.function(sample.parameters(), **accepts)
    parameter = next(p for p in every_parameter(optimizer) if p.dim())
    parameter.grad = torch.ones(parameter.shape).to_sparse()
    with pytest.raises(TypeError, match=f"{sample.name}: gradients must be dense, got torch.spars"):
        sample.step(optimizer)
