"""How an operator enters ``tilework::`` so that every transform of PyTorch composes with it.

The arguments of an operator are a named tuple, and its results another one: the schema comes from
these, and kernels, fakes and derivatives take and give them by name. ``torch.compile`` sees one
node.
"""

import functools
import importlib
import itertools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, ParamSpec, TypeVar, get_type_hints

import numpy as np
import torch
from torch import Tensor

from tilework import _checks, _torch

_library: Any = torch.library.Library("tilework", "DEF")  # type: ignore[no-untyped-call]

if TYPE_CHECKING:
    Given = TypeVar("Given", bound=NamedTuple)
    Results = TypeVar("Results", bound=NamedTuple)
else:  # where it is a function
    Given = TypeVar("Given", bound=tuple)
    Results = TypeVar("Results", bound=tuple)
Gradients = Mapping[str, Tensor | None]
"""By the names of the arguments; those that are not needed may be missing."""
Needed = frozenset[str]
"""The names of the arguments whose gradients are needed."""

P = ParamSpec("P")
T = TypeVar("T")
HALF = (torch.float16, torch.bfloat16)


def no_products(given: Any) -> int:
    """The operations of what multiplies no matrices, as ``torch.utils.flop_counter`` counts."""
    return 0


def computation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and accumulators: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def only_reference() -> bool:
    """Whether the code runs under a transform for which operators have no rule.

    These are forward-mode differentiation, and ``torch.func`` inside of ``torch.compile``.
    """
    return _torch.is_forward_mode() or (
        torch.compiler.is_compiling() and _torch.transforms_are_active()
    )


def is_autocast(device: str) -> bool:
    """Whether autocast is on for a type of device; some, such as meta, know no autocast."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def without_autocast(function: Callable[P, T]) -> Callable[P, T]:
    """Keep autocast from lowering the products inside; what comes first begins with a tensor."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if not _torch.autocast_is_active():
            return function(*args, **kwargs)
        first: Any = next(iter((*args, *kwargs.values())))
        device = (first if isinstance(first, Tensor) else first[0]).device.type
        if not is_autocast(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run


_TENSORS = (Tensor, Tensor | None)
_PLAIN = (Tensor, torch.nn.Parameter)
_NUMPY = frozenset(np.sctypeDict.values())
"""The types of scalars, which neither a schema nor a kernel takes."""
_SCHEMA: dict[Any, str] = {
    Tensor: "Tensor",
    bool: "bool",
    int: "SymInt",
    float: "float",
    str: "str",
    torch.dtype: "ScalarType",
    list[bool]: "bool[]",
    list[int]: "SymInt[]",
    list[float]: "float[]",
    list[Tensor]: "Tensor[]",
}
_SCHEMA |= {kind | None: f"{name}?" for kind, name in _SCHEMA.items()}


def _record(name: str, fields: Mapping[str, Any]) -> Any:
    return NamedTuple(name, list(fields.items()))


def _schema(operator: str, types: Mapping[str, Any]) -> str:
    for name, kind in types.items():
        if kind not in _SCHEMA:
            accepted = "a Tensor, bool, int, float, str, dtype, a list of the first four, or None"
            raise TypeError(f"{operator}: {name} must be annotated as {accepted}, got {kind}")
    return ", ".join(f"{_SCHEMA[kind]} {name}" for name, kind in types.items())


def _tensors(arguments: type[Any]) -> list[str]:
    """The names of the arguments that are tensors."""
    return [name for name, kind in get_type_hints(arguments).items() if kind in _TENSORS]


def _check_names(operator: str, role: str, names: Sequence[str], accepted: Sequence[str]) -> None:
    """Refuse a name that would be passed over, or missed in a backward long after."""
    for name in names:
        if name not in accepted:
            raise ValueError(
                f"{operator}: {role} must name some of {', '.join(accepted)}, got {name!r}"
            )


def _check_kept(
    operator: str,
    arguments: type[Any],
    results: type[Any],
    saved: Sequence[str],
    constant: Sequence[str],
) -> None:
    _check_names(operator, "saved", saved, (*_tensors(arguments), *results._fields))
    _check_names(operator, "constant", constant, results._fields)


_shardings: list[tuple[Any, Callable[..., Any]]] = []


@_torch.constant_when_traced
def _register_shardings() -> None:
    """Tell distributed tensors about the operators, once there may be such tensors."""
    if _shardings and "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor.experimental import register_sharding

        while _shardings:
            operator, sharding = _shardings.pop()
            register_sharding(operator)(sharding)


def define(
    name: str,
    arguments: type[Given],
    results: type[Results],
    kernel: Callable[[Given], Results],
    fake: Callable[[Given], Results],
    *,
    derivative: Callable[[Given, Results, Results, Needed], Gradients],
    saved: Sequence[str] = (),
    constant: Sequence[str] = (),
    attached: Sequence[str] = (),
    operations: Callable[[Given], int] = no_products,
    sharding: Callable[..., Any] | None = None,
) -> Callable[[Given], Results]:
    """Register the operator ``tilework::name`` and return what differentiates and batches it.

    Args:
        name: The operator's name.
        arguments: The named tuple of its arguments; the schema is made from the annotations.
        results: The named tuple of its results, all tensors.
        kernel: Computes the results.
        fake: Makes empty results of the same shapes and dtypes.
        derivative: Gradients by the names of arguments, from the arguments and results that are
            ``saved`` (None in place of others), the gradients of the results (None where a result
            was not used), and the names of the arguments whose gradients are needed.
        saved: Which tensors ``derivative`` reads, of the arguments and of the results.
        constant: Results that have no gradient.
        attached: Saved results that stay results: what ``derivative`` makes of them is
            differentiated through them. Others it reads as constants.
        operations: The floating-point operations of the matrix products that a call is, for
            ``torch.utils.flop_counter``; what an implementation does twice counts once.
        sharding: The rule for ``torch.distributed.tensor.experimental.register_sharding``.
    """
    _check_kept(name, arguments, results, saved, constant)
    _check_names(
        name, "attached (all saved)", attached, [one for one in results._fields if one in saved]
    )
    operator = _Operator(
        name, arguments, results, kernel, derivative, saved, constant, attached, operations
    )
    operator.register(fake, sharding)
    return operator


def define_pair(
    name: str,
    arguments: type[Given],
    results: type[Results],
    fake: Callable[[Given], Results],
    *,
    reference: Callable[[Given], Results],
    rooms: str,
    differentiable: Sequence[str],
    saved: Sequence[str],
    constant: Sequence[str] = (),
    forward: str = "forward",
    backward: str = "backward",
    empty_gradient: Callable[[Any, Tensor], Tensor] | None = None,
    second_order: Callable[[Given], Results] | None = None,
    operations: Callable[[Given], int] = no_products,
    backward_operations: Callable[[Given, Needed], int] = lambda given, needed: 0,
) -> Callable[[Given], Results]:
    """Register an operator and that of its gradients, for a folder of implementations.

    One argument is called ``implementation``: a module of the package ``rooms``, imported on
    its first use, which has ``forward(given) -> results`` and ``backward(given, results, grads,
    needed) -> gradients`` as :func:`define` describes them, by these or other names. ``reference``
    is plain PyTorch: that of the name, what runs under transforms that have no other rule, and the
    second derivative of all, unless that is left to ``second_order``, the same results in plain
    PyTorch, where the reference takes more memory than the implementations. ``differentiable``
    names the arguments that have gradients; ``saved`` holds these and what else ``backward`` and
    ``reference`` read. ``empty_gradient`` makes one like those of ``backward``, from the arguments
    of the gradients' operator and a leaf, where they are not contiguous. ``operations`` are those
    that :func:`define` describes, ``backward_operations`` those of the gradients that are needed.
    """
    _check_kept(name, arguments, results, saved, constant)  # before anything is registered
    leaves = [one for one in _tensors(arguments) if one in saved]
    _check_names(name, "differentiable (all saved)", differentiable, leaves)
    gradients = _Gradients(
        arguments,
        results,
        second_order or reference,
        differentiable,
        saved,
        constant,
        empty_gradient,
    )
    of_implementation = without_autocast(of_rooms(rooms, backward))
    derivative = define(
        f"{name}_backward",
        gradients.arguments,
        gradients.results,
        lambda given: gradients.kernel(of_implementation, given),
        gradients.fake,
        derivative=gradients.second_derivative,
        saved=gradients.saved,
        operations=lambda given: gradients.operations(backward_operations, given),
    )
    operator = define(
        name,
        arguments,
        results,
        of_rooms(rooms, forward),
        fake,
        derivative=lambda *args: gradients.derivative(derivative, of_implementation, *args),
        saved=saved,
        constant=constant,
        operations=operations,
    )
    return or_reference(operator, reference)


def of_rooms(rooms: str, function: str) -> Callable[..., Any]:
    """A function of the module that ``implementation`` names, imported on its first use."""

    @functools.cache
    def room(implementation: str) -> Any:
        return importlib.import_module(f"{rooms}.{implementation}")

    return lambda given, *args: getattr(room(given.implementation), function)(given, *args)


def or_reference(
    operator: Callable[[Given], Results], reference: Callable[[Given], Results]
) -> Callable[[Given], Results]:
    """An operator, but the reference where it is named, or under transforms without a rule."""
    without_lowering = without_autocast(reference)

    def call(given: Any) -> Results:
        if given.implementation == "reference" or only_reference():
            return without_lowering(given)
        return operator(given)

    return call


def _is_plain(tensor: Tensor) -> bool:
    """Whether memory holds the values: it is no subclass, nor on meta, nor lazily negated."""
    return type(tensor) in _PLAIN and not tensor.is_meta and not tensor.is_neg()


def _is_watched(values: Iterable[Any]) -> bool:
    """Whether a compiler, a transform, a mode or a kind of tensor has to see a call."""
    return (
        torch.compiler.is_compiling()
        or _torch.transforms_are_active()
        or _torch.modes_are_active()
        or any(isinstance(one, Tensor) and not _is_plain(one) for one in values)
    )


class _Gradients(Generic[Given, Results]):
    """The operator of the gradients of another one, as :func:`define` takes it."""

    def __init__(
        self,
        arguments: type[Given],
        results: type[Results],
        second_order: Callable[[Given], Results],
        differentiable: Sequence[str],
        saved: Sequence[str],
        constant: Sequence[str],
        empty_gradient: Callable[[Any, Tensor], Tensor] | None,
    ) -> None:
        self.empty_gradient = empty_gradient or (lambda _, leaf: leaf.new_empty(leaf.shape))
        self.of_arguments: Any = arguments
        self.of_results: Any = results
        self.second_order = second_order
        self.differentiable = tuple(differentiable)
        types = get_type_hints(arguments)
        used = (f"grad_{name}" for name in results._fields if name not in constant)
        upstream: dict[str, Any] = dict.fromkeys(used, Tensor | None)
        tensors = {name: types.get(name, Tensor) for name in saved}
        options = {name: kind for name, kind in types.items() if kind not in _TENSORS}
        fields = tensors | upstream | {"needed": list[bool]} | options
        self.saved = (*upstream, *(name for name in saved if name in types))
        self.arguments = _record("Arguments", fields)
        self.results = _record("Gradients", dict.fromkeys(differentiable, Tensor))

        def places(names: Iterable[str]) -> list[int | None]:
            order = list(fields)
            return [order.index(name) if name in fields else None for name in names]

        self.places = (
            places(arguments._fields),
            places(results._fields),
            places(f"grad_{name}" for name in results._fields),
        )

    def unpack(self, given: Any) -> tuple[Any, Any, Any]:
        """Arguments and results of the other operator, and the gradients of its results."""
        arguments, results, grads = (
            [None if place is None else given[place] for place in places] for places in self.places
        )
        return self.of_arguments(*arguments), self.of_results(*results), self.of_results(*grads)

    def wanted(self, given: Any) -> Needed:
        """The names of the gradients to compute."""
        names = zip(self.differentiable, given.needed, strict=True)
        return frozenset(name for name, need in names if need)

    def kernel(self, backward: Callable[..., Gradients], given: Any) -> Any:
        """The gradients, an empty tensor for each that is not needed."""
        found = backward(*self.unpack(given), self.wanted(given))
        first = getattr(given, self.differentiable[0])
        return self.results(
            *(
                found[name] if need else first.new_empty(0)
                for name, need in zip(self.differentiable, given.needed, strict=True)
            )
        )

    def operations(self, backward: Callable[[Given, Needed], int], given: Any) -> int:
        """Those of the gradients that are needed."""
        arguments, *_ = self.unpack(given)
        return backward(arguments, self.wanted(given))

    def fake(self, given: Any) -> Any:
        """Gradients of the shapes of the arguments."""
        leaves = (getattr(given, name) for name in self.differentiable)
        first = getattr(given, self.differentiable[0])
        return self.results(
            *(
                self.empty_gradient(given, leaf) if need else first.new_empty(0)
                for leaf, need in zip(leaves, given.needed, strict=True)
            )
        )

    def derivative(
        self,
        operator: Callable[[Any], Any],
        backward: Callable[..., Gradients],
        given: Given,
        results: Results,
        grads: Results,
        needed: Needed,
    ) -> Gradients:
        """The gradients of the other operator, by this one where somebody looks at the call."""
        if not torch.is_grad_enabled() and not _is_watched((*given, *results, *grads)):
            all_found = backward(given, results, grads, needed)
            return {name: all_found.get(name) for name in needed}
        values = given._asdict() | {
            name: value for name, value in results._asdict().items() if value is not None
        }
        values |= {f"grad_{name}": value for name, value in grads._asdict().items()}
        values["needed"] = [name in needed for name in self.differentiable]
        found = operator(self.arguments(*(values[name] for name in self.arguments._fields)))
        return {name: getattr(found, name) for name in self.differentiable if name in needed}

    def second_derivative(self, given: Any, _: Any, grads: Any, needed: Needed) -> Gradients:
        """Gradients of the upstream gradients and of the arguments, by autograd."""
        arguments, _, upstream = self.unpack(given)
        used = [name for name, grad in upstream._asdict().items() if grad is not None]
        leaves = [name for name in self.differentiable if getattr(arguments, name) is not None]
        wanted = self.wanted(given)

        def function(*values: Tensor) -> tuple[Tensor, ...]:
            named = dict(zip(leaves, values, strict=True))
            found = self.second_order(arguments._replace(**named))
            return tuple(getattr(found, name) for name in used)

        def first_derivative(*values: Tensor) -> tuple[Tensor, ...]:
            pulled = torch.func.vjp(function, *values[len(used) :])[1](values[: len(used)])
            return tuple(grad for grad, name in zip(pulled, leaves, strict=True) if name in wanted)

        values = [getattr(upstream, name) for name in used]
        values += [getattr(arguments, name) for name in leaves]
        first, pull, *_ = torch.func.vjp(first_derivative, *values)
        of_first = (getattr(grads, name) for name in leaves if name in wanted)
        found = pull(
            tuple(
                torch.zeros_like(value) if grad is None else grad
                for value, grad in zip(first, of_first, strict=True)
            )
        )
        names = [f"grad_{name}" for name in used] + leaves
        return dict(zip(names, found, strict=True))


def _picked(names: Iterable[str], order: Sequence[str]) -> Callable[[Sequence[Any]], Any]:
    """What picks the values of names from a sequence in this order; the last one where missing."""
    places = [order.index(name) if name in order else -1 for name in names]
    if len(places) > 1:
        return itemgetter(*places)
    return lambda values: tuple(values[place] for place in places)


class _Operator(Generic[Given, Results]):
    """An operator by names: packs what PyTorch hands over by position."""

    def __init__(
        self,
        name: str,
        arguments: type[Given],
        results: type[Results],
        kernel: Callable[[Given], Results],
        derivative: Callable[[Given, Results, Results, Needed], Gradients],
        saved: Sequence[str],
        constant: Sequence[str],
        attached: Sequence[str],
        operations: Callable[[Given], int],
    ) -> None:
        self.name = name
        self.arguments: Any = arguments
        self.results: Any = results
        self.kernel, self.derivative = without_autocast(kernel), derivative
        self.operations = operations
        self.argument_names: tuple[str, ...] = arguments._fields
        self.result_names: tuple[str, ...] = results._fields
        self.count = len(self.result_names)
        types = get_type_hints(arguments)
        # What is done at every call goes by places, not by names, which takes less time.
        of_arguments = [name for name in saved if name in types]
        of_results = [name for name in saved if name not in types]
        tensors = _tensors(arguments)
        options = [name for name in types if name not in tensors]
        self.tensors = _picked(tensors, self.argument_names)
        self.saved_arguments = _picked(of_arguments, self.argument_names)
        self.options = _picked(options, self.argument_names)
        self.constant = _picked(constant, self.result_names)
        self.saved_results = _picked(of_results, self.result_names)
        self.is_attached = [name in (*constant, *attached) for name in of_results]
        self.only_attached = all(self.is_attached)
        kept = [*options, *of_arguments]
        self.kept_arguments = _picked(self.argument_names, kept)
        self.kept_results = _picked(self.result_names, [""] * len(kept) + of_results)
        _library.define(f"{name}({_schema(name, types)}) -> ({', '.join(['Tensor'] * self.count)})")
        self.operator = getattr(torch.ops.tilework, name).default

        methods = {
            "setup_context": staticmethod(self.setup_context),
            "backward": staticmethod(self.backward),
            "vmap": staticmethod(self.vmap),
        }
        self.transformable = self._function(forward=staticmethod(self.operator), **methods)
        # Without a setup_context, as PyTorch inspects the signature at each call of those.
        self.eager = self._function(
            forward=staticmethod(self.forward), backward=methods["backward"]
        )

    def _function(self, **members: Any) -> Any:
        return type(self.name, (torch.autograd.Function,), members)

    def register(
        self, fake: Callable[[Given], Results], sharding: Callable[..., Any] | None
    ) -> None:
        """Tell PyTorch about the kernel and its rules."""
        name = f"tilework::{self.name}"
        _library.impl(self.name, self.run, "CompositeExplicitAutograd")
        torch.library.register_fake(
            name, lambda *args: self.plain(fake(self.arguments(*args))), lib=_library
        )
        torch.library.register_autograd(
            name, self.backward, setup_context=self.setup_context, lib=_library
        )
        torch.library.register_vmap(name, self.vmap, lib=_library)
        if sharding is not None:
            _shardings.append((self.operator, sharding))

    def __call__(self, given: Given) -> Results:
        found = self.apply(given)
        if type(found) is not self.results:
            found = self.results(found) if self.count == 1 else self.results(*found)
        named: Results = found
        return named

    def apply(self, given: Given) -> Any:
        """Call what the surroundings ask for; the results may be without their names."""
        if torch.compiler.is_compiling():
            _register_shardings()
            return self.operator(*given)
        if not _NUMPY.isdisjoint(map(type, given)):
            given = self.arguments(*map(_checks.plain, given))
        # Autograd formulas of operators do not compose with torch.func, those of functions do.
        if _torch.transforms_are_active():
            return self.transformable.apply(*given)
        if _torch.modes_are_active():
            _torch.tell_flop_counters(self.operator, self.count_operations)
            return self.operator(*given)
        # Nobody looks at this call, so that the dispatcher can be spared: it takes as long as the
        # launch of a small kernel.
        needs_grad = False
        for value in self.tensors(given):
            if value is not None:
                if not _is_plain(value):
                    _register_shardings()
                    return self.operator(*given)
                needs_grad |= value.requires_grad
        if needs_grad and torch.is_grad_enabled():
            return self.eager.apply(*given)
        return self.kernel(given)

    def plain(self, results: Results) -> Any:
        """Results as PyTorch wants them."""
        return results[0] if self.count == 1 else tuple(results)

    def run(self, *args: Any) -> Any:
        """The kernel by position."""
        return self.plain(self.kernel(self.arguments(*args)))

    def count_operations(self, *args: Any, out_val: Any = None) -> int:
        """The operations by position, as flop counters ask for them."""
        return self.operations(self.arguments(*args))

    def forward(self, ctx: Any, *args: Any) -> Any:
        """The kernel, and what its gradients need."""
        found = self.run(*args)
        self.setup_context(ctx, args, found)
        return found

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Save what the derivative reads."""
        outputs = (output,) if self.count == 1 else output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*self.constant(outputs))
        saved = self.saved_results(outputs)
        if not self.only_attached:
            saved = [
                one if attached else one.detach()
                for one, attached in zip(saved, self.is_attached, strict=True)
            ]
        ctx.save_for_backward(*self.saved_arguments(inputs), *saved)
        ctx.options = self.options(inputs)

    def backward(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients by position, from those by name."""
        if all(grad is None for grad in grads):
            return (None,) * len(self.argument_names)
        kept = (*ctx.options, *ctx.saved_tensors, None)
        found = self.derivative(
            self.arguments(*self.kept_arguments(kept)),
            self.results(*self.kept_results(kept)),
            self.results(*grads),
            frozenset(itertools.compress(self.argument_names, ctx.needs_input_grad)),
        )
        return tuple(map(found.get, self.argument_names))

    def vmap(self, info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        """One element of the batch after another."""
        found = []
        for index in range(info.batch_size):
            element = [
                arg.select(dim, index) if isinstance(arg, Tensor) and dim is not None else arg
                for arg, dim in zip(args, in_dims, strict=True)
            ]
            found.append(self(self.arguments(*element)))
        if not found:
            raise ValueError(f"tilework::{self.name}: vmap over an empty dimension")
        stacked = self.results(*map(torch.stack, zip(*found, strict=True)))
        return self.plain(stacked), 0 if self.count == 1 else (0,) * self.count
