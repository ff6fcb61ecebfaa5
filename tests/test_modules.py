"""What every public module owes its surroundings: its states, its copies, and torch's layers.

A module that cannot be made without arguments, or that has running statistics, is in a table here.
"""

import copy
import dataclasses
import inspect
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tilework import attention, catalog, losses, norms, optim, quant
from tilework._options import StatefulModule
from tilework.norms._layer import NormLayer

from helpers import SEED, of_numpy

MODULES = [
    entry.object
    for entry in catalog.entries()
    if inspect.isclass(entry.object) and issubclass(entry.object, nn.Module)
]


def values() -> Tensor:
    return torch.tensor([torch.nan, 1001.0, -2.5, 3.0])


# Arguments of modules that need some, or whose states depend on optional ones.
ARGUMENTS: dict[type[nn.Module], Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]] = {
    attention.QKNormAttention: lambda: ((9,), {"num_heads": 3}),
    attention.SeerGate: lambda: ((8, 4, 2), {"gate_dim": 6}),
    losses.CompSumLoss: lambda: ((torch.rand(4),), {}),
    losses.CrossEntropyWithZLoss: lambda: ((torch.rand(4),), {}),
    losses.DynamicLossSizeWeighting: lambda: ((3,), {}),
    losses.EMOLoss: lambda: ((torch.rand(4, 3),), {}),
    losses.GlobalLoadBalancer: lambda: ((4,), {}),
    losses.GradNorm: lambda: ((2,), {"initial_losses": [1.0, 0.3]}),
    losses.HLGaussLoss: lambda: ((-1.0, 1.0, 5), {}),
    losses.LinearCrossEntropy: lambda: ((torch.rand(4),), {}),
    losses.LinearCrossEntropyLoss: lambda: ((3, 4), {"bias": True, "weight": torch.rand(4)}),
    losses.MultilabelFocalLoss: lambda: ((), {}),
    losses.NumberTokenCrossEntropyLoss: lambda: ((values(),), {}),
    losses.NumberTokenLoss: lambda: ((values(),), {}),
    losses.QuantileAggregator: lambda: ((3, 4), {"per_level": True}),
    losses.SquentropyLoss: lambda: ((torch.rand(4),), {}),
    norms.LayerNorm: lambda: (((2, 4), 0.1), {}),
    norms.PartialRMSNorm: lambda: ((8,), {"fraction": 0.5}),
    norms.RMSNorm: lambda: ((8,), {"weight_offset": 1.0}),
    norms.ScaledStdConv2d: lambda: ((2, 4, 3), {"gamma": 1.5, "gain_init": 0.5}),
    quant.QuantLinear: lambda: ((quant.rtn_quantize(torch.rand(2, 3)),), {}),
    optim.WTACRSLinear: lambda: ((4, 3), {"sample_ratio": 0.5, "min_samples": 2}),
    quant.LowRankLinear: lambda: (
        (quant.rtn_quantize(torch.rand(2, 3)), torch.rand(2, 1), torch.rand(1, 3)),
        {},
    ),
    quant.OrthoScaleTransform: lambda: ((4,), {}),
    quant.SmoothSiLU: lambda: ((torch.rand(3),), {}),
    quant.OneBitLinear: lambda: ((4, 3), {"bias": True}),
    quant.QuestLinear: lambda: ((8, 3), {"block_size": 4, "weight_bits": 2}),
    quant.ReSTEConv2d: lambda: ((2, 4, 3), {"threshold": 1.0, "interval": 0.2}),
    quant.ReSTELinear: lambda: ((4, 3), {"binarize_input": False, "threshold": 2.0}),
}


def arguments(cls: type[nn.Module]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    torch.manual_seed(SEED)
    return ARGUMENTS[cls]() if cls in ARGUMENTS else ((), {})


def make(cls: type[nn.Module]) -> nn.Module:
    positional, options = arguments(cls)
    return cls(*positional, **options)


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def given(module: nn.Module) -> set[str]:
    """Tensors that are the caller's, which torch's rules hold for."""
    if isinstance(module, quant.QuantLinear):
        return set(tensors(module))
    if not dataclasses.is_dataclass(module):
        return set()
    fields = dataclasses.fields(module)
    return {f.name for f in fields if "buffer" in f.metadata and not f.metadata["exact"]}


def own_buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: b for name, b in module.named_buffers() if name not in given(module)}


def assert_same(actual: nn.Module, expected: nn.Module, without: set[str] = frozenset()) -> None:
    """Hold the tensors of a module to those of another one, bit for bit."""
    left, right = tensors(actual), tensors(expected)
    assert left.keys() - without == right.keys() - without
    for name in right.keys() - without:
        assert left[name].device == right[name].device, name
        torch.testing.assert_close(
            left[name],
            right[name],
            rtol=0,
            atol=0,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def reset(module: nn.Module) -> None:
    """As FSDP and launchers do it: each module that can, its own tensors."""
    torch.manual_seed(SEED)
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()


def emptied(module: nn.Module) -> nn.Module:
    """On the CPU, with what the memory held."""
    module.to_empty(device="cpu")
    return module


every = pytest.mark.parametrize("cls", MODULES, ids=lambda cls: cls.__name__)
stateful = pytest.mark.parametrize(
    "cls", [c for c in MODULES if issubclass(c, StatefulModule)], ids=lambda cls: cls.__name__
)


@every
def test_meta_initialization_and_a_strict_load(cls: type[nn.Module]) -> None:
    fresh = make(cls)
    with torch.device("meta"):
        module = make(cls)
    assert all(tensor.is_meta for tensor in tensors(module).values())
    emptied(module).load_state_dict(fresh.state_dict(), strict=True)
    assert_same(module, fresh)
    with torch.device("meta"):
        module = make(cls)
    module.load_state_dict(fresh.state_dict(), strict=True, assign=True)
    assert {name for name, t in tensors(module).items() if t.is_meta} <= {"counts"}


@every
@pytest.mark.parametrize("on_meta", [True, False])
def test_reset_equals_fresh(cls: type[nn.Module], on_meta: bool) -> None:
    positional, options = arguments(cls)
    torch.manual_seed(SEED)
    fresh = cls(*positional, **options)
    with torch.device("meta" if on_meta else "cpu"):
        module = cls(*positional, **options)
    emptied(module)
    reset(module)
    assert_same(module, fresh, without=given(module))


@every
def test_reset_after_use_equals_fresh(cls: type[nn.Module]) -> None:
    positional, options = arguments(cls)
    torch.manual_seed(SEED)
    fresh = cls(*positional, **options)
    module = cls(*positional, **options)
    constant = {"token_values", *given(module)}
    with torch.no_grad():
        for name, tensor in tensors(module).items():
            if name not in constant:
                tensor.fill_(3)
    reset(module)
    assert_same(module, fresh)


@every
def test_casts_round_no_state(cls: type[nn.Module]) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        module, fresh = make(cls).to(dtype), make(cls)
        for name, buffer in own_buffers(module).items():
            old = own_buffers(fresh)[name]
            floating = old.is_floating_point()
            assert buffer.dtype == (
                torch.promote_types(old.dtype, dtype) if floating else old.dtype
            )
            assert torch.equal(buffer.nan_to_num(7), old.to(buffer.dtype).nan_to_num(7))
        reset(module)
        assert {b.dtype for b in own_buffers(module.bfloat16()).values()} == {
            b.dtype for b in own_buffers(make(cls).to(dtype)).values()
        }
    with torch.device("meta"):
        module = make(cls).half()
    found = {name: buffer.dtype for name, buffer in own_buffers(module).items()}
    expected = {name: buffer.dtype for name, buffer in own_buffers(make(cls)).items()}
    assert {name: expected[name] for name in found} == found


@stateful
def test_a_low_default_dtype_rounds_no_state(cls: type[nn.Module]) -> None:
    positional, options = arguments(cls)
    fresh = cls(*positional, **options)
    torch.set_default_dtype(torch.bfloat16)
    try:
        module = cls(*positional, **options)
        reset(module)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(module, fresh)


@pytest.mark.untyped
@every
def test_scalars_of_numpy_become_numbers(cls: type[nn.Module]) -> None:
    positional, options = arguments(cls)
    plain = dict(enumerate(positional)) | options
    scalars = of_numpy({str(name): value for name, value in plain.items()})
    expected = cls(*positional, **options)
    module = cls(*list(scalars.values())[: len(positional)], **{n: scalars[n] for n in options})
    assert repr(module) == repr(expected)
    assert not [name for name, value in vars(module).items() if isinstance(value, np.generic)]


@every
def test_copies(cls: type[nn.Module]) -> None:
    module = make(cls)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is cls
        assert repr(other) == repr(module)
        assert_same(other, module)
        other.load_state_dict(module.state_dict(), strict=True)
        reset(other)
        torch.manual_seed(SEED)
        again = make(cls)
        reset(again)
        assert_same(other, again)


# A module with running statistics, a call that moves them, and what must leave them alone.
Calls = tuple[Callable[[], nn.Module], Callable[[Any], Any], dict[str, Callable[[Any], Any]]]


def of_tasks(criterion: nn.Module, *scales: float) -> Any:
    shared = torch.ones(3, requires_grad=True)
    return criterion([scale * shared.sum() for scale in scales], [shared])


def steep(criterion: nn.Module) -> Any:
    shared = torch.full((1,), 1e-30, requires_grad=True)
    return criterion([1e30 * shared.sum(), shared.sum()], [shared])


def rows(bad: float) -> Tensor:
    return torch.tensor([[1.0, 3.0], [bad, 2.0]])


RUNNING: dict[type[nn.Module], Calls] = {
    losses.GradNorm: (
        lambda: losses.GradNorm(2),
        lambda module: of_tasks(module, 1.0, 10.0),
        {
            "nan": lambda module: of_tasks(module, torch.nan, 2.0),
            "inf": lambda module: of_tasks(module, 2.0, torch.inf),
            "square": steep,
        },
    ),
    losses.DynamicLossSizeWeighting: (
        lambda: losses.DynamicLossSizeWeighting(2),
        lambda module: module(rows(5.0)),
        {
            "nan": lambda module: module(rows(torch.nan)),
            "inf": lambda module: module(rows(torch.inf)),
        },
    ),
    losses.OnlinePlattScaling: (
        losses.OnlinePlattScaling,
        lambda module: module.update(0.7, 1),
        {"nan": lambda module: module.update(torch.nan, 1)},
    ),
    losses.Calibeating: (
        losses.Calibeating,
        lambda module: module.update(0.7, 1),
        {"nan": lambda module: module.update(torch.nan, 1)},
    ),
    losses.TemperatureScaling: (
        losses.TemperatureScaling,
        lambda module: module.fit(rows(5.0), torch.tensor([0, 0])),
        {"nan": lambda module: module.fit(rows(torch.nan), torch.tensor([0, 0]))},
    ),
}


REFUSING = {losses.OnlinePlattScaling, losses.Calibeating, losses.TemperatureScaling}


def test_every_module_with_running_statistics_is_in_the_table() -> None:
    """Those that count experts take integers alone, and constants do not move."""
    others = {losses.GlobalLoadBalancer, losses.NumberTokenLoss, losses.NumberTokenCrossEntropyLoss}
    assert {c for c in MODULES if issubclass(c, StatefulModule)} - others == set(RUNNING)


@pytest.mark.untyped
@pytest.mark.parametrize("cls", RUNNING, ids=lambda cls: cls.__name__)
def test_what_is_not_finite_leaves_running_statistics_alone(cls: type[nn.Module]) -> None:
    create, use, bad = RUNNING[cls]
    for call in bad.values():
        module, twin = create(), create()
        use(module)
        use(twin)
        assert any(
            not torch.equal(a, b)
            for a, b in zip(module.buffers(), create().buffers(), strict=False)
        )
        if cls in REFUSING:
            with pytest.raises(ValueError, match=cls.__name__):
                call(module)
        else:
            assert call is steep or not call(module).isfinite()
        assert_same(module, twin)
        use(module)
        use(twin)
        assert_same(module, twin)


IN_PLACE_OF = [
    (cls, getattr(nn, match.group(1)))
    for cls in MODULES
    if (match := re.search(r"in place of ``(?:torch\.)?nn\.(\w+)``", inspect.getdoc(cls) or ""))
    and hasattr(nn, match.group(1))
]


def test_replacements_are_found() -> None:
    assert {cls for cls, _ in IN_PLACE_OF} >= {
        norms.LayerNorm,
        norms.RMSNorm,
        losses.CrossEntropyWithZLoss,
    }


@pytest.mark.parametrize(("cls", "theirs"), IN_PLACE_OF, ids=lambda cls: cls.__name__)
def test_a_replacement_takes_the_arguments_of_torch(
    cls: type[nn.Module], theirs: type[nn.Module]
) -> None:
    """In torch's order and with its defaults, but for what the docstring says is not offered."""
    ours, expected = (inspect.signature(c).parameters for c in (cls, theirs))
    deviations = (inspect.getdoc(cls) or "").partition("Deviations:")[2]
    positional = [n for n, p in expected.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    found = [n for n, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert found[: len(positional)] == positional
    for name, parameter in expected.items():
        if f"``{name}``" not in deviations:
            assert name in ours
            assert ours[name].default == parameter.default, name
    if issubclass(cls, NormLayer):
        assert issubclass(cls, theirs)


def test_norm_layers_keep_out_of_the_decay_of_a_trainer() -> None:
    """By the rule of ``transformers``, which looks at the type, and at names that differ here."""
    trainer = pytest.importorskip("transformers.trainer_pt_utils")
    for layers in (nn, norms):
        block = nn.ModuleDict({"ln_1": layers.LayerNorm(4), "c_fc": nn.Linear(4, 4)})
        decayed = trainer.get_parameter_names(block, [nn.LayerNorm], ["bias"])
        assert decayed == ["c_fc.weight"]
