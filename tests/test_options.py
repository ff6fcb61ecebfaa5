"""Options that are declared as fields, of modules and of plain classes."""

import copy
import inspect
import io
import pickle
from dataclasses import InitVar, field
from inspect import Parameter

import pytest
import torch
from torch import Tensor, nn

from tilework._options import Options, OptionsModule, buffer


def scaled(input: Tensor, weight: Tensor | None = None, *, power: int = 1, kind: str = "mean"):
    result = (input if weight is None else input * weight) ** power
    return getattr(result, kind)()


class Scaled(OptionsModule):
    weight: Tensor | None = buffer(default=None, kw_only=False)
    power: int = 1
    kind: str = "mean"

    def _check(self) -> None:
        if self.kind not in ("mean", "sum"):
            raise ValueError(f"scaled: kind must be 'mean' or 'sum', got {self.kind!r}")

    def forward(self, input: Tensor) -> Tensor:
        return scaled(input, self.weight, **self.options())


class Headed(Scaled):
    """A subclass with arguments that are no options, and a buffer that is keyword-only here."""

    features: InitVar[int] = field(kw_only=False)
    bias: InitVar[bool] = False
    weight: Tensor | None = buffer(default=None)
    gate: nn.Module | None = None
    kind: str = field(default="sum", init=False)

    def __post_init__(self, features: int, bias: bool) -> None:
        super().__post_init__()
        self.linear = nn.Linear(features, 2, bias)


class Power(Options):
    base: float | Tensor = field(default=2.0, kw_only=False)
    exponent: int = 1
    scales: list[float] = field(default_factory=list)

    def __call__(self) -> float | Tensor:
        return self.base**self.exponent


def signature(callable_) -> list[tuple]:
    parameters = inspect.signature(callable_).parameters.values()
    return [(p.name, p.kind, p.default, p.annotation) for p in parameters]


def test_signature() -> None:
    positional, named, empty = (
        Parameter.POSITIONAL_OR_KEYWORD,
        Parameter.KEYWORD_ONLY,
        Parameter.empty,
    )
    assert signature(Scaled) == [
        ("weight", positional, None, Tensor | None),
        ("power", named, 1, int),
        ("kind", named, "mean", str),
    ]
    assert signature(Headed) == [
        ("features", positional, empty, int),
        ("weight", named, None, Tensor | None),
        ("power", named, 1, int),
        ("bias", named, False, bool),
        ("gate", named, None, nn.Module | None),
    ]
    assert [name for name, *_ in signature(Power)] == ["base", "exponent", "scales"]


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("match", "call"),
    [
        (r"Scaled.__init__\(\) got an unexpected .* 'knid'", lambda: Scaled(knid="mean")),
        (r"Power.__init__\(\) got an unexpected .* 'exponnet'", lambda: Power(exponnet=2)),
        ("positional arguments", lambda: Scaled(None, 2)),
        ("positional arguments", lambda: Power(2.0, 2)),
        ("missing 1 required positional argument: 'features'", lambda: Headed()),
        ("unexpected keyword argument 'kind'", lambda: Headed(3, kind="mean")),
        ("cannot assign 'list' object to buffer 'weight'", lambda: Scaled([1.0])),
    ],
)
def test_refuses(match: str, call) -> None:
    with pytest.raises(TypeError, match=match):
        call()


def test_checks_when_made() -> None:
    with pytest.raises(ValueError, match=r"scaled: kind must be .*, got 'max'"):
        Scaled(kind="max")


def test_calls_its_function_with_the_options_of_now() -> None:
    input, weight = torch.rand(3), torch.rand(3)
    module = Scaled(weight, power=2)
    assert module.options() == {"power": 2, "kind": "mean"}
    assert torch.equal(module(input), scaled(input, weight, power=2))
    module.kind = "sum"
    assert torch.equal(module(input), scaled(input, weight, power=2, kind="sum"))
    assert Power(3.0, exponent=2)() == 9
    assert Power(torch.tensor(3.0), exponent=2)() == 9


def test_buffers() -> None:
    weight = torch.rand(3)
    module = Scaled(weight)
    assert module.state_dict().keys() == {"weight"}
    assert module.weight is weight
    assert module.double().weight.dtype == torch.float64
    assert Scaled().state_dict() == {}
    assert dict(Scaled()._buffers) == {"weight": None}
    given = Scaled(nn.Parameter(weight))
    assert not list(given.parameters())
    assert given.state_dict().keys() == {"weight"}


def copies(module: nn.Module) -> list[nn.Module]:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return [
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(file, weights_only=False),
    ]


def test_copies() -> None:
    module = Headed(3, weight=torch.rand(2), power=2, gate=nn.ReLU())
    for other in copies(module):
        assert other is not module
        assert other.options() == module.options() | {"gate": other.gate}
        assert other.weight is not module.weight
        assert torch.equal(other.weight, module.weight)
        assert repr(other) == repr(module)
        assert other.state_dict().keys() == {"weight", "linear.weight"}


def test_subclass() -> None:
    module = Headed(3, bias=True, gate=nn.ReLU())
    assert module.kind == "sum"
    assert module.options() == {"power": 1, "kind": "sum", "gate": module.gate}
    assert list(dict(module.named_children())) == ["gate", "linear"]
    assert module.linear.bias is not None
    assert not hasattr(module, "features")
    assert not hasattr(module, "bias")
    assert Headed(3).gate is None
    assert Headed(3).linear.bias is None


def test_subclass_with_a_constructor_of_its_own() -> None:
    class Doubled(Scaled):
        layer: nn.Linear

        def __init__(self, features: int) -> None:
            super().__init__(power=2)
            self.layer = nn.Linear(features, features)

    class Named(Doubled):
        name: str = "doubled"

    assert signature(Named) == [("features", Parameter.POSITIONAL_OR_KEYWORD, Parameter.empty, int)]
    assert Named(3).name == "doubled"
    module = Doubled(3)
    assert module.options() == {"power": 2, "kind": "mean"}
    assert module.state_dict().keys() == {"layer.weight", "layer.bias"}
    with pytest.raises(TypeError, match="unexpected keyword argument 'power'"):
        Doubled(3, power=2)


def test_repr() -> None:
    assert repr(Scaled()) == "Scaled()"
    assert repr(Scaled(torch.rand(3), kind="sum")) == "Scaled(kind='sum')"
    lines = repr(Headed(3, power=2, gate=nn.ReLU())).split("\n")
    assert lines[1:3] == ["  power=2", "  (gate): ReLU()"]
    assert repr(Power(exponent=2, scales=[1.0])) == "Power(exponent=2, scales=[1.0])"
    assert repr(Power(torch.ones(2))) == "Power(base=tensor([1., 1.]), scales=[])"


def test_mutable_defaults() -> None:
    assert Power().scales is not Power().scales
    with pytest.raises(ValueError, match="mutable default <class 'list'> for field scales"):

        class Shared(Options):
            scales: list[float] = []  # noqa: RUF012


def test_positional_fields_by_default() -> None:
    class Layer(OptionsModule, kw_only=False):
        size: int
        eps: float = 1e-5

    class Offset(Layer):
        offset: float = 0.0

    assert (Offset(3, 0.1, offset=1.0).size, Offset(3, 0.1).eps) == (3, 0.1)
    assert Offset(3).options() == {"offset": 0.0}


@pytest.mark.untyped
def test_compiles() -> None:
    module, input = Scaled(torch.rand(3)), torch.rand(3)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(input), module(input))
    module.kind = "sum"
    assert torch.equal(compiled(input), scaled(input, module.weight, kind="sum"))
