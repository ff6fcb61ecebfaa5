"""One step of an optimizer: what has a gradient is counted, measured, and updated together."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tilework import _checks
from tilework._operators import computation_dtype
from tilework.optim._optimizer import updates
from tilework.optim._optimizer.updates import Numbers, Part, Way

if TYPE_CHECKING:
    from tilework.optim._optimizer import Optimizer


class Member(NamedTuple):
    """A parameter that has a gradient."""

    part: Part
    step: Tensor
    t: int | None
    """The number of its steps with this one; None if reading it would synchronize."""
    group: dict[str, Any]

    def number(self) -> Any:
        """The number of its steps, a tensor if reading it would synchronize."""
        return exact(self.step) if self.t is None else self.t


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's garbage collector away.

    A walk over thousands of parameters makes containers that live until its end: enough for full
    collections, which look at all objects of the process and took half of the step's time.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@_no_collection()
def take(
    optimizer: Optimizer,
    only: Collection[Tensor] | None = None,
    *,
    compiled: bool = False,
    **given: Any,
) -> None:
    """Update all parameters that have a gradient, or those of them that are named.

    What is ``given`` for this step, such as its loss, ``_numbers`` finds in the group.
    """
    members = _members(optimizer, only)
    totals = _totals(optimizer, members, given)
    kinds: dict[Any, list[Member]] = defaultdict(list)
    for member in members:
        kinds[_kind(member)].append(member)

    def numbers_of(member: Member, t: Any) -> dict[str, Any]:
        group = member.group
        numbers = _plain(optimizer, group, given) | totals.get(id(group), {}) | {"t": t}
        numbers = _on(member.part.parameter.device, numbers)
        numbers |= optimizer._numbers(numbers)
        return numbers | {"decay": optimizer._decay(numbers)}

    for kind in kinds.values():
        compile_ = compiled or kind[0].group["compiled"]
        rule = None if compile_ else _kernel_of(optimizer, kind[0])
        if rule is not None:
            kind = _launch(rule, kind, numbers_of)
        together = [kind] if kind and kind[0].t is not None else [[member] for member in kind]
        for some in together:
            _update(optimizer, some, numbers_of(some[0], some[0].number()), compile_)


def _members(optimizer: Optimizer, only: Collection[Tensor] | None) -> list[Member]:
    """The parameters that have a gradient, their steps counted with this one."""
    found = list(_found(optimizer, only))
    on_device = [step for _, step, group in found if group["capturable"]]
    if on_device:
        torch._foreach_add_(on_device, 1)
    on_host = [step for _, step, group in found if not group["capturable"]]
    if on_host:  # a number would become a tensor for each
        torch._foreach_add_(on_host, torch.ones((), device="cpu"), alpha=1)
    return [
        Member(part, step, None if group["capturable"] else int(step.item()), group)
        for part, step, group in found
    ]


def _found(
    optimizer: Optimizer, only: Collection[Tensor] | None
) -> Iterator[tuple[Part, Tensor, dict[str, Any]]]:
    position = -1
    named = None if only is None else set(map(id, only))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            position += 1
            gradient = parameter.grad
            if gradient is None or (named is not None and id(parameter) not in named):
                continue
            if gradient.layout != torch.strided:
                raise TypeError(
                    f"{type(optimizer).__name__}: gradients must be dense, got {gradient.layout}"
                )
            step = optimizer._counter_of(parameter, group)
            states = optimizer._state_of(parameter, group)
            yield Part(parameter, gradient, states, None, position), step, group


def _is_stochastic(member: Member) -> bool:
    return (
        member.group["rounding"] == "stochastic" and member.part.parameter.dtype == torch.bfloat16
    )


def _placed(member: Member) -> Part:
    """The part, with the places of its elements if rounding asks for them."""
    part = member.part
    if not _is_stochastic(member):
        return part
    return part._replace(places=updates.places_of(part.parameter))


_KERNEL_DEVICES = ("cuda",)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _kernel_rule(optimizer: type[Optimizer]) -> str | None:
    """The kernel's name of a rule; None for a class that has it from another and overrides it."""
    owner = next(kind for kind in optimizer.__mro__ if "_update" in vars(kind))
    name: str | None = vars(owner).get("_kernel")
    return name


def _kernel_of(optimizer: Optimizer, member: Member) -> str | None:
    """The rule of a kernel that updates many tensors in one launch, if there is one."""
    on_device = member.part.parameter.device.type in _KERNEL_DEVICES
    if member.group["foreach"] is not None or not on_device or not _has_triton():
        return None
    return _kernel_rule(type(optimizer))


def _launch(
    rule: str, kind: list[Member], numbers_of: Callable[[Member, Any], Numbers]
) -> list[Member]:
    """Update by a kernel what it can find; return the others."""
    from tilework.optim._optimizer import triton

    places: list[int | None] = [0] * len(kind)
    if _is_stochastic(kind[0]):
        places = [updates.first_place(member.part.parameter) for member in kind]
    left: list[Member] = []
    ready: list[tuple[Member, Part, int]] = []
    parts = updates.dense([member.part for member in kind])
    for member, part, place in zip(kind, parts, places, strict=True):
        if part is None or place is None:
            left.append(member)
        else:
            ready.append((member, part, place))
    if ready:
        t: Any = kind[0].t
        if t is None:
            t = torch.stack([member.step for member, _, _ in ready]).double()
        triton.launch(
            rule,
            [part for _, part, _ in ready],
            [place for _, _, place in ready],
            numbers_of(kind[0], t),
            _way(kind[0]),
        )
    return left


def _way(member: Member) -> Way:
    group = member.group
    return Way(group.get("maximize", False), group["rounding"], group["seed"])


def exact(number: Tensor) -> Tensor:
    """A tensor of one element as a number: without dimensions, in the widest dtype."""
    return number.reshape(()).to(torch.float32 if number.device.type == "mps" else torch.float64)


def _kind(member: Member) -> Any:
    """What is updated together: alike in all but its elements."""
    part = member.part
    return (
        id(member.group),
        member.t,
        part.parameter.dtype,
        part.parameter.device,
        part.gradient.dtype,
        *[state.dtype for state in part.states.values()],
    )


def _plain(optimizer: Optimizer, group: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The options of a group, and what is given, as numbers."""
    values = {name: _number(group[name], default) for name, default in optimizer.defaults.items()}
    return values | {name: _number(value, 0.0) for name, value in given.items()}


def _number(value: Any, default: Any) -> Any:
    if isinstance(value, Tensor):
        return float(value) if _checks.holds_values(value) else exact(value)
    value = _checks.plain(value)
    if isinstance(default, float) and type(value) is int:
        return float(value)
    return value


def _on(device: torch.device, numbers: Numbers) -> dict[str, Any]:
    """The same, tensors on a device."""
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in numbers.items()
    }


def _as_tensors(numbers: Numbers) -> dict[str, Any]:
    """What may change from step to step, as tensors: a new value needs no new graph."""

    def as_tensor(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(as_tensor, value))
        return torch.tensor(value, dtype=torch.float64) if isinstance(value, float) else value

    return {
        name: as_tensor(value)
        for name, value in (dict(numbers) | {"t": _float(numbers["t"])}).items()
    }


def _float(count: Any) -> Any:
    return count if isinstance(count, Tensor) else float(count)


def _totals(
    optimizer: Optimizer, members: list[Member], given: dict[str, Any]
) -> dict[int, dict[str, Any]]:
    """What a global rule measures, summed over all parameters or those of each group.

    By group, with what the optimizer makes of it there.
    """
    if not members or not optimizer._is_global() or optimizer._measure is None:
        return {}
    numbers = {id(group): _plain(optimizer, group, given) for group in optimizer.param_groups}
    everything: dict[str, Any] = {}
    totals = {key: {} if optimizer._measures_each_group else everything for key in numbers}
    for member in members:
        part, key = updates.whole(member.part), id(member.group)
        dtype = computation_dtype(part.parameter.dtype)
        measured = optimizer._measure(
            part.parameter.to(dtype),
            updates.computed_gradient(part.gradient, dtype, member.group.get("maximize", False)),
            updates.computed_states(part.states, dtype),
            numbers[key] | {"t": member.number()},
        )
        for name, value in measured.items():
            if _checks.is_distributed(value):
                value = value.full_tensor()  # type: ignore[attr-defined]
            total = totals[key]
            total[name] = total[name] + value.to(total[name].device) if name in total else value
    for group in optimizer.param_groups:
        total = totals[id(group)]
        if total:
            device = next(iter(total.values())).device
            known = _on(device, numbers[id(group)] | total)
            totals[id(group)] = total | optimizer._measured(group, known)
    return totals


def _update(
    optimizer: Optimizer, members: list[Member], numbers: dict[str, Any], compiled: bool
) -> None:
    group, way = members[0].group, _way(members[0])
    rule = type(optimizer)._update
    call = updates.apply
    if compiled:
        constants = {name: numbers[name] for name in optimizer._constants}
        call, numbers = updates.apply_compiled, _as_tensors(numbers) | constants
    if not optimizer._elementwise:
        for member in members:
            if member.part.parameter.numel():
                call(rule, updates.whole(_placed(member)), numbers, way)
        return
    members = [member for member in members if updates.local(member.part.parameter).numel()]
    if not members:
        return
    parts = [_placed(member) for member in members]
    if not compiled and group["foreach"] is None and not isinstance(numbers["t"], Tensor):
        steps = [member.step for member in members]
        if not updates.are_dense(parts):
            parts = [updates.flat(part) for part in parts]
        if _is_plain(parts) and optimizer._native(parts, steps, numbers, way.maximize):
            return
    on_cpu = members[0].part.parameter.device.type == "cpu"
    sizes = updates.CPU if on_cpu else updates.OTHER
    small: list[Part] = []
    for part in map(updates.flat, parts):
        flat = part.parameter.dim() == 1
        if group["foreach"] is not False and flat and part.parameter.numel() < sizes.small:
            small.append(part)
        elif compiled:
            call(rule, part, numbers, way)
        else:
            for block in updates.blocks(part, sizes.block):
                call(rule, block, numbers, way)
    for batch in updates.batches(small, sizes.joined):
        joined = updates.join(batch) if len(batch) > 1 else batch[0]
        call(rule, joined, numbers, way)
        if len(batch) > 1:
            updates.scatter(joined, batch)


def _is_plain(parts: Sequence[Part]) -> bool:
    """Whether all are dense and of one dtype, as PyTorch's own operators want it."""
    first = parts[0]
    dtypes = {first.gradient.dtype, *(state.dtype for state in first.states.values())}
    return dtypes == {first.parameter.dtype} and updates.are_dense(parts)
