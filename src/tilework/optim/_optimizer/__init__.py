"""What every optimizer of the library has: options, states, groups, checkpoints, the step.

An optimizer says three things, and nothing else::

    class Lion(DecoupledDecay, Optimizer):
        lr: float | Tensor = option(1e-4, rate)                     # its options
        betas: tuple[float, float] = option((0.9, 0.99), decay_rates)
        weight_decay: float = option(0.0, non_negative)

        def _states(self, parameter, group):                     # its states
            return {"exp_avg": PARAMETER}

        @staticmethod
        def _update(p, g, state, group):                             # its rule
            ...
            return p - group["lr"] * direction

``_update`` returns the new parameter, and changes ``state`` in place or by assignment; it changes
neither ``p`` nor ``g``. All are in the dtype of computation. ``group`` holds the options of the
parameter's group, the number of the step ``t``, and what ``_numbers`` makes of them: all that is
one number for each step and more than a product, such as a power, stands there, since ``_update``
runs for each element. Numbers are Python's, or tensors without dimensions, so that no new graph is
needed for a new value; ``_update`` uses operators that take both.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from tilework import _checks, _torch
from tilework._operators import computation_dtype
from tilework.optim._optimizer import options, step, updates
from tilework.optim._optimizer.options import (
    Declared,
    count,
    decay_rate,
    decay_rates,
    finite,
    flag,
    fraction,
    function,
    non_negative,
    non_positive,
    one_of,
    option,
    optional,
    pair,
    positive,
    rate,
)
from tilework.optim._optimizer.step import exact
from tilework.optim._optimizer.updates import Numbers, Part

__all__ = [
    "PARAMETER",
    "SCALAR",
    "DecoupledDecay",
    "LossOptimizer",
    "Numbers",
    "Optimizer",
    "Part",
    "average",
    "average_",
    "average_square_",
    "bias_corrections",
    "check_nesterov",
    "cos",
    "count",
    "decay_rate",
    "decay_rates",
    "descend",
    "dot",
    "evaluated",
    "exact",
    "finite",
    "flag",
    "fraction",
    "function",
    "largest",
    "length",
    "move",
    "non_negative",
    "of_whole",
    "non_positive",
    "one_of",
    "option",
    "optional",
    "pair",
    "positive",
    "rate",
    "reset_",
    "rms",
    "where",
]

PARAMETER = "parameter"
"""The shape of a state that has the parameter's."""
SCALAR = ()

_KNOWN = {"params", "name", "param_names", "initial_lr"}  # besides options, in a group


class Optimizer(Declared, torch.optim.Optimizer):
    """The base of all optimizers, with the options that all have."""

    params: ParamsT
    _: KW_ONLY
    maximize: bool = option(False, flag, meaning="Whether the objective is maximized.")
    foreach: bool | None = option(
        None,
        optional(flag),
        meaning="Whether small tensors are updated as one. None: where that is faster, and by an "
        "operator of PyTorch's where there is one.",
    )
    capturable: bool = option(
        False,
        flag,
        meaning="Whether the step can be captured in a CUDA graph: counters are on the "
        "parameter's device.",
    )
    rounding: str = option(
        "nearest",
        one_of("nearest", "stochastic", "kahan"),
        meaning="How bfloat16 parameters take their new values: ``'nearest'``; ``'stochastic'``, "
        "which keeps the mean, from random numbers that depend on ``seed``, step, parameter and "
        "element alone; or ``'kahan'``, which keeps what rounding takes away in a state.",
    )
    seed: int = option(0, count(0), meaning="Of stochastic rounding, at least 0.")
    state_dtype: torch.dtype | None = option(
        None,
        optional(options.floating_dtype),
        meaning="The dtype of the states; None is float32, for float64 parameters float64, which "
        "is what all is computed in.",
    )
    compiled: bool = option(
        False,
        flag,
        meaning="Whether ``torch.compile`` makes one loop of the rule. So it does where ``step`` "
        "is compiled.",
    )

    _elementwise: ClassVar[bool] = True
    """Whether the rule acts on each element alone."""
    _dtypes: ClassVar[Mapping[str, torch.dtype]] = {}
    """Of states that have one of their own."""
    _accepts_complex: ClassVar[bool] = False
    """Whether the rule has a meaning for complex parameters, as pairs of real numbers."""

    def __post_init__(self) -> None:
        names = [field.name for field in dataclasses.fields(self)]
        given = {name: self.__dict__.pop(name) for name in names}
        (params,) = (given.pop(name) for name in names if name not in options.checks(type(self)))
        self._in_backward = False
        torch.optim.Optimizer.__init__(self, self._groups(params), self._checked(given))

    # What an optimizer says.

    def _groups(self, given: Any) -> Any:
        """The parameters or groups that PyTorch's constructor takes, of what this one got."""
        return given

    def _check(self, group: Mapping[str, Any]) -> None:
        """Refuse options that do not go together."""

    def _check_parameter(self, parameter: Tensor, group: Mapping[str, Any]) -> None:
        """Refuse a parameter that the rule has no meaning for."""

    def _states(
        self, parameter: Tensor, group: Mapping[str, Any]
    ) -> Mapping[str, str | tuple[int, ...]]:
        """The shapes of the states of a parameter, by name."""
        return {}

    def _numbers(self, group: Numbers) -> dict[str, Any]:
        """What is one number for each step; ``group`` has the options and ``t``."""
        return {}

    def _decay(self, group: Numbers) -> Any:
        """The part of the old parameter that is taken away, or None; here None."""
        return None

    @staticmethod
    def _update(p: Tensor, g: Tensor, state: dict[str, Tensor], group: Numbers) -> Tensor:
        """The rule: the new parameter."""
        raise NotImplementedError

    _measure: ClassVar[Callable[..., dict[str, Tensor]] | None] = None
    """As ``_update``, before it: scalars, whose sums over all parameters ``_numbers`` finds.

    It changes nothing, and is not compiled.
    """
    _measures_each_group: ClassVar[bool] = False
    """Whether these are sums over the parameters of the group."""
    _group_states: ClassVar[tuple[str, ...]] = ()
    """Tensors without dimensions in a group that ``_measured`` changes in place, at first 0."""

    def _measured(self, group: dict[str, Any], numbers: Numbers) -> dict[str, Any]:
        """What is one number for each step and group, of these sums and the options."""
        return {}

    def _is_global(self) -> bool:
        """Whether the step of one parameter depends on the gradients of others."""
        return self._measure is not None

    _constants: ClassVar[tuple[str, ...]] = ()
    """Options that compiled rules see as Python's numbers: a new value may need a new graph."""

    _kernel: ClassVar[str | None] = None
    """The name of the rule in ``triton.py``, beside an ``_update`` that has a kernel."""

    def _native(
        self, parts: Sequence[Part], steps: Sequence[Tensor], group: Numbers, maximize: bool
    ) -> bool:
        """Update by an operator of PyTorch's, where there is one: whether it did."""
        return False

    # Options and groups.

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _checked(self, given: Mapping[str, Any]) -> dict[str, Any]:
        checks = options.checks(type(self))
        checked = {name: check(self._name, name, given[name]) for name, check in checks.items()}
        if checked["compiled"] and checked["foreach"]:
            raise ValueError(f"{self._name}: foreach must be None or False with compiled=True")
        self._check(checked)
        return checked

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own, as ``torch.optim.Optimizer`` does."""
        if not isinstance(param_group, dict):
            raise _checks.bad_type(self._name, "param_group", "a dict", param_group)
        unknown = param_group.keys() - self.defaults.keys() - _KNOWN - set(self._group_states)
        if unknown:
            accepted = ", ".join(sorted(_KNOWN | self.defaults.keys()))
            raise ValueError(
                f"{self._name}: a group must have no keys but {accepted}, got {min(unknown)!r}"
            )
        group = param_group | self._checked(self.defaults | param_group)
        params = group["params"]
        if isinstance(params, Iterable) and not isinstance(params, Tensor | set):
            params = group["params"] = list(params)
            for parameter in params:
                self._accept(parameter, group)
        elif isinstance(params, Tensor):
            self._accept(params, group)
        self._complete(group)
        super().add_param_group(group)
        self._make_group_states(group)

    def _complete(self, group: dict[str, Any]) -> None:
        """Set what a group has once and for all when it is added."""

    def _make_group_states(self, group: dict[str, Any]) -> None:
        first = next(iter(group["params"]), torch.zeros(()))
        dtype = computation_dtype(first.dtype)
        for name in self._group_states:
            state = torch.as_tensor(group.get(name, 0.0), dtype=dtype, device=first.device)
            group[name] = state.clone()

    def _accept(self, parameter: Any, group: Mapping[str, Any]) -> None:
        if isinstance(parameter, tuple):
            _, parameter = parameter
        if not isinstance(parameter, Tensor):
            raise _checks.bad_type(self._name, "params", "tensors", parameter)
        if not (parameter.is_leaf or parameter.retains_grad):
            raise ValueError(f"{self._name}: params must be leaf tensors, got one that is computed")
        if not (parameter.is_floating_point() or parameter.is_complex()):
            raise _checks.bad_type(self._name, "params", "of floating dtypes", parameter)
        if parameter.is_conj():  # its real numbers would be a copy, and the step lost
            raise ValueError(f"{self._name}: params must not be lazily conjugated")
        if parameter.is_complex():
            if not self._accepts_complex:
                raise _checks.bad_type(self._name, "params", "real", parameter)
            if group["state_dtype"] is not None:
                raise ValueError(f"{self._name}: state_dtype must be None for complex parameters")
        if parameter.dtype == torch.float16 and group["rounding"] != "nearest":
            raise ValueError(
                f"{self._name}: rounding must be 'nearest' for float16 parameters, "
                f"got {group['rounding']!r}"
            )
        self._check_parameter(parameter, group)

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """The states and options, as of ``torch.optim``; None stands for callables."""
        saved = super().state_dict()
        for group in saved["param_groups"]:
            for name in self.defaults.keys() & group.keys():
                if callable(group[name]):
                    group[name] = None
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave; each state keeps the dtype that it has there.

        So do those of ``torch.optim``, and of older versions with fewer options.
        """
        handle = self.register_load_state_dict_pre_hook(_hide_from_casts)  # after those of users
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        before = self.__dict__.get("param_groups", [])
        super().__setstate__(state)
        self.__dict__.setdefault("_in_backward", False)
        self.defaults.pop("differentiable", None)
        for index, group in enumerate(self.param_groups):
            old = before[index] if before else self.defaults
            for name in self.defaults:
                group.setdefault(name, old[name])
                if group[name] is None and callable(old[name]):
                    group[name] = old[name]
            self._make_group_states(group)
            for parameter in group["params"]:
                if parameter in self.state:
                    self.state[parameter] = {
                        name: _restored(name, value, parameter, group)
                        for name, value in self.state[parameter].items()
                    }

    # The step.

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ``torch.optim.Optimizer``; nothing while steps are taken in the backward pass."""
        if not self._in_backward:
            super().zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update the parameters that have a gradient.

        Args:
            closure: Evaluates the model again and returns the loss; called once, with gradients.

        Returns:
            What ``closure`` returned, or None.
        """
        loss = evaluated(closure)
        if not self._in_backward:
            _take(self, torch.compiler.is_compiling())
        return loss

    def _state_of(self, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """The states of a parameter, those made that are missing."""
        state = self.state[parameter]
        spec = self._states(parameter, group)
        if group["rounding"] == "kahan" and parameter.dtype == torch.bfloat16:
            spec = {**spec, "compensation": PARAMETER}
        try:
            return {name: state[name] for name in spec}
        except KeyError:  # in the first step
            self._make_states(state, spec, parameter, group)
            return {name: state[name] for name in spec}

    def _counter_of(self, parameter: Tensor, group: Mapping[str, Any]) -> Tensor:
        """The number of a parameter's steps, made where it is missing."""
        state = self.state[parameter]
        if "step" not in state:
            device = parameter.device if group["capturable"] else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        step: Tensor = state["step"]
        return step

    def _make_states(
        self,
        state: dict[str, Any],
        spec: Mapping[str, str | tuple[int, ...]],
        parameter: Tensor,
        group: Mapping[str, Any],
    ) -> None:
        dtype = group["state_dtype"] or computation_dtype(parameter.dtype)
        for name, shape in spec.items():
            if name not in state:
                kept = torch.bfloat16 if name == "compensation" else self._dtypes.get(name, dtype)
                state[name] = _zeros(shape, parameter, kept)


def evaluated(closure: Callable[[], Any] | None) -> Any:
    """What a closure returns, which needs gradients; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


@_torch.never_traced
@torch.no_grad()
def _take(optimizer: Optimizer, compiled: bool, **given: Any) -> None:
    """A step; under ``torch.compile`` its rule is compiled, not the walk over the parameters."""
    _torch.check_capture(optimizer)
    step.take(optimizer, compiled=compiled, **given)


class LossOptimizer(Optimizer):
    """The base of optimizers whose step depends on the loss, which ``_numbers`` finds.

    A loss is minimized: there is no ``maximize``.
    """

    maximize: ClassVar[bool] = False  # type: ignore[misc]  # no field, hence no option

    def step(  # type: ignore[override]
        self, closure: Callable[[], Any] | None = None, *, loss: float | Tensor | None = None
    ) -> Any:
        """Update the parameters that have a gradient.

        Args:
            closure: Evaluates the model again and returns the loss; called once, with gradients.
            loss: The loss, a number or a tensor without dimensions; it or ``closure``.

        Returns:
            What ``closure`` returned, or None.
        """
        if (closure is None) == (loss is None):
            raise ValueError(f"{self._name}: either closure or loss must be given")
        result = evaluated(closure)
        loss = self._checked_loss(result if loss is None else loss)
        if not self._in_backward:
            _take(self, torch.compiler.is_compiling(), loss=loss)
        return result

    def _checked_loss(self, loss: Any) -> float | Tensor:
        if not isinstance(loss, Tensor):
            return float(_checks.number(self._name, "loss", loss))
        if loss.dim() or loss.is_complex():
            raise _checks.bad_value(self._name, "loss", "a real number without dimensions", loss)
        return loss.detach()


class DecoupledDecay(Declared):
    """Weight decay apart from the gradient: ``lr * weight_decay`` of the old parameter.

    With ``decouple_lr`` it is ``lr / reference_lr * weight_decay``, which does not depend on the
    base learning rate, only on its schedule.
    """

    _: KW_ONLY
    decouple_lr: bool = option(
        False,
        flag,
        meaning="Whether weights decay by ``lr / reference_lr * weight_decay`` in each step, and "
        "not by ``lr * weight_decay``.",
    )
    reference_lr: float | None = option(
        None,
        optional(non_negative),
        meaning="For that; None is ``lr`` as it is when the group is added.",
    )

    def _complete(self, group: dict[str, Any]) -> None:
        """Record the learning rate that the decay refers to."""
        if group["reference_lr"] is None:
            group["reference_lr"] = float(group["lr"])
        if group["decouple_lr"] and group["reference_lr"] == 0:
            raise ValueError(
                f"{type(self).__name__}: reference_lr must be above 0 with decouple_lr=True"
            )

    def _decay(self, group: Numbers) -> Any:
        """The part of the old parameter that is taken away, or None."""
        weight_decay = group["weight_decay"]
        if isinstance(weight_decay, float) and weight_decay == 0:
            return None
        scale = group["reference_lr"] if group["decouple_lr"] else 1.0
        return group["lr"] / scale * weight_decay


def average(old: Tensor, new: Tensor, keep: float | Tensor) -> Tensor:
    """``keep * old + (1 - keep) * new``."""
    if isinstance(keep, Tensor):
        return keep * old + (1 - keep) * new
    return torch.lerp(old, new.to(old.dtype), 1 - keep)


def average_(old: Tensor, new: Tensor, keep: float | Tensor) -> Tensor:
    """The same in place: a step of a running mean."""
    new = updates.like(new.to(old.dtype), old)
    if isinstance(keep, Tensor):
        return old.mul_(keep).add_((1 - keep) * new)
    return old.lerp_(new, 1 - keep)


def average_square_(old: Tensor, new: Tensor, keep: float | Tensor) -> Tensor:
    """A step of a running mean of squares, in place."""
    if isinstance(keep, Tensor):
        return average_(old, new * new, keep)
    new = updates.like(new.to(old.dtype), old)
    return old.mul_(keep).addcmul_(new, new, value=1 - keep)


def reset_(tensor: Tensor, condition: Any) -> Tensor:
    """Set a tensor to zero in place if a condition holds, whatever it has been."""
    if isinstance(condition, Tensor):
        return tensor.copy_(torch.where(condition, 0.0, tensor))
    return tensor.zero_() if condition else tensor


def move(p: Tensor, direction: Tensor, size: float | Tensor) -> Tensor:
    """``p - size * direction``."""
    if isinstance(size, Tensor):
        return torch.addcmul(p, direction, size.to(p.dtype), value=-1)
    return torch.sub(p, direction, alpha=size)


def descend(p: Tensor, numerator: Tensor, denominator: Tensor, step_size: float | Tensor) -> Tensor:
    """``p - step_size * numerator / denominator``."""
    if isinstance(step_size, Tensor):
        return move(p, numerator / denominator, step_size)
    return torch.addcdiv(p, numerator, denominator, value=-step_size)


def where(condition: Any, yes: Any, no: Any) -> Any:
    """One of two numbers or tensors; a tensor where the condition is one."""
    if not isinstance(condition, Tensor):
        return yes if condition else no
    return torch.where(condition, *(_like(number, condition) for number in (yes, no)))


def _like(number: Any, condition: Tensor) -> Tensor:
    if isinstance(number, Tensor):
        return number
    dtype = torch.float32 if condition.device.type == "mps" else torch.float64
    return torch.as_tensor(number, dtype=dtype, device=condition.device)


def cos(angle: Any) -> Any:
    """The cosine of a number."""
    return angle.cos() if isinstance(angle, Tensor) else math.cos(angle)


def largest(tensor: Tensor) -> Tensor:
    """The largest absolute value of a tensor; of a distributed one, of all shards."""
    local = updates.local(tensor)
    if local.numel():
        low, high = local.aminmax()
        value = torch.maximum(-low, high)
    else:
        value = local.new_zeros(())  # which DTensor cannot tell
    return _torch.largest_of_shards(value, tensor) if _checks.is_distributed(tensor) else value


def of_whole(function: Callable[..., Any], tensor: Tensor) -> Any:
    """What a function of a whole tensor gives; of a distributed one, on every process alike.

    Results of the tensor's shape are placed as the tensor is.
    """
    if not _checks.is_distributed(tensor):
        return function(tensor)
    results = function(tensor.full_tensor())  # type: ignore[attr-defined]

    def placed(result: Tensor) -> Tensor:
        if result.shape != tensor.shape:
            return result
        return updates.like(_torch.replicated(result, tensor), tensor)

    return tuple(map(placed, results)) if isinstance(results, tuple) else placed(results)


def dot(a: Tensor, b: Tensor, dims: tuple[int, ...] | None = None) -> Tensor:
    """The sum of the products of all elements, or over some dimensions, which stay with size 1.

    Dimensions are counted from the first. PyTorch's own norms and products add up one after another
    on the CPU, and lose digits in large tensors.
    """

    def summed(a: Tensor, b: Tensor) -> Tensor:
        products = a * b
        return products.sum() if dims is None else products.sum(dims, keepdim=True)

    rows = updates.rows_of_block(a)
    if rows is not None:
        parts = [
            summed(*pieces)
            for pieces in zip(torch.split(a, rows), torch.split(b, rows), strict=True)
        ]
        if dims is not None and 0 not in dims:
            return torch.cat(parts)
        return torch.stack(parts).sum(0)
    return summed(a, b)


def length(tensor: Tensor) -> Tensor:
    """The Euclidean norm of all elements, those of all shards too."""
    norm = dot(tensor, tensor).sqrt()
    return norm.full_tensor() if _checks.is_distributed(norm) else norm  # type: ignore[attr-defined]


def rms(tensor: Tensor) -> Tensor:
    """The root of the mean square of all elements."""
    return length(tensor) / tensor.numel() ** 0.5


def bias_corrections(group: Numbers) -> tuple[Any, Any]:
    """``1 - beta ** t`` of both ``betas``."""
    beta1, beta2 = group["betas"]
    return 1 - beta1 ** group["t"], 1 - beta2 ** group["t"]


def check_nesterov(optimizer: str, group: Mapping[str, Any]) -> None:
    """Refuse Nesterov's momentum without a momentum, or with dampening."""
    if group["nesterov"] and (group["momentum"] == 0 or group.get("dampening", 0) != 0):
        raise ValueError(
            f"{optimizer}: nesterov must be False without a momentum or with dampening"
        )


class _Hidden:
    """A state on its way through ``torch.optim.Optimizer.load_state_dict``, which casts tensors."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


def _hide_from_casts(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    def hide(state: Any) -> Any:
        if not isinstance(state, dict):
            return state
        return {
            name: _Hidden(value) if isinstance(value, Tensor) else value
            for name, value in state.items()
        }

    states = {key: hide(state) for key, state in state_dict["state"].items()}
    return state_dict | {"state": states}


def _restored(name: str, value: Any, parameter: Tensor, group: Mapping[str, Any]) -> Any:
    if isinstance(value, _Hidden):
        value = value.value
        if name != "step":
            return value.to(parameter.device)
    if name != "step":
        return value
    value = value if isinstance(value, Tensor) else torch.tensor(float(value))
    return value.to(parameter.device if group["capturable"] else "cpu", torch.float32)


def _zeros(shape: str | tuple[int, ...], parameter: Tensor, dtype: torch.dtype | None) -> Tensor:
    if parameter.is_complex():
        dtype = parameter.dtype
    if isinstance(shape, str):
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    state = torch.zeros(shape, dtype=dtype, device=parameter.device)
    if shape and _checks.is_distributed(parameter):
        return _torch.replicated(state, parameter)
    return state
