"""Sampled products, against exact fractions, enumeration and chi-square tests."""

import copy
import io
import math
import pickle
import weakref
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tilework.optim import WTACRSLinear, wta_crs_matmul, wta_crs_sample

import samples
from calls import Call, draw
from helpers import FLOATING, HALF, Memory, dtype_name

FALSE_ALARM = 1e-6


def winners_of(mass: list[float], k: int) -> tuple[list[int], Fraction, list[Fraction]]:
    """The winners, the mass of the others and the probabilities, in exact fractions."""
    total = sum(map(Fraction, mass))
    shares = [Fraction(value) / total for value in mass]
    order = sorted(range(len(mass)), key=lambda row: -shares[row])  # stable
    best = min(range(k), key=lambda c: (sum(shares[row] for row in order[c:]) / (k - c), c))
    return order[:best], sum((shares[row] for row in order[best:]), Fraction()), shares


MASSES = st.lists(
    st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, 3.0, 16.0]) | st.floats(1e-3, 1e3),
    min_size=1,
    max_size=9,
).filter(any)


@given(MASSES, st.integers(1, 8), st.integers(0, 2**32))
def test_samples(mass: list[float], k: int, seed: int) -> None:
    probabilities = torch.tensor(mass, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    index, weight = wta_crs_sample(probabilities, k, generator=generator)
    assert index.dtype == torch.int64
    if k >= len(mass):
        assert index.tolist() == list(range(len(mass)))
        assert torch.equal(weight, torch.ones(len(mass)).double())
        return
    winners, rest, shares = winners_of(mass, k)
    assert index.shape == weight.shape == (k,)
    assert index[: len(winners)].tolist() == winners
    assert (weight[: len(winners)] == 1).all()
    for row, value in zip(index.tolist()[len(winners) :], weight[len(winners) :], strict=True):
        if rest == 0:
            assert value == 0
        else:
            assert row not in winners
            expected = rest / ((k - len(winners)) * shares[row])
            assert value.item() == pytest.approx(float(expected), rel=1e-12)


@given(MASSES.filter(lambda mass: len(mass) > 1), st.integers(1, 8))
def test_the_variance_is_that_of_drawing_alone_at_most(mass: list[float], k: int) -> None:
    """Of a sum of terms in proportion to the probabilities, with random signs."""
    k = min(k, len(mass) - 1)
    winners, rest, _ = winners_of(mass, k)
    assert not winners or 1 - rest >= Fraction(len(winners), k)
    assert rest**2 / (k - len(winners)) <= Fraction(1, k)


@pytest.fixture
def uniform(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Have all uniform numbers be a given one."""

    def fix(value: float) -> None:
        def rand(*shape: int, **options: Any) -> Tensor:
            return torch.full(shape, value, dtype=options["dtype"])

        monkeypatch.setattr(torch, "rand", rand)

    return fix


def outcomes(mass: list[float], k: int) -> Iterator[tuple[float, float]]:
    """Probabilities of what the draws can be, if all are alike, and a uniform number for each.

    The expectation of a mean over independent draws is that over one of them.
    """
    winners, rest, shares = winners_of(mass, k)
    order = sorted(range(len(mass)), key=lambda row: -shares[row])
    before = Fraction()
    for row in order[len(winners) :]:
        if part := shares[row] / rest:
            yield float(part), float(before + part / 2)
        before += part


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_extreme_draws(number: float, uniform: Callable[[float], None]) -> None:
    uniform(number)
    for mass in ([0.0, 8.0, 1.0, 1.0, 0.0], [1.0, 0.0, 1.0], [8.0, 0.1, 0.3, 0.0, 0.7]):
        winners, _, _ = winners_of(mass, 2)
        index, weight = wta_crs_sample(torch.tensor(mass).double(), 2)
        assert weight.isfinite().all()
        for row in index.tolist()[len(winners) :]:
            assert row not in winners
            assert mass[row] > 0


@pytest.mark.untyped
def test_bad_probabilities_that_cannot_be_read() -> None:
    for mass in ([1.0, -1.0, 1.0, 1.0], [0.0] * 4):
        sample = torch.func.vmap(lambda one: wta_crs_sample(one, 2), randomness="different")
        index, weight = sample(torch.tensor([mass, [1.0, 2.0, 3.0, 4.0]]))
        assert weight[0].isnan().all()
        assert weight[1].isfinite().all()
        assert index.min() >= 0
        assert index.max() < 4


MASS = [0.5, 4.0, 1.0, 0.25, 0.0, 2.0, 1.0]


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_weights_sum_to_1_in_expectation(k: int, uniform: Callable[[float], None]) -> None:
    probabilities, total = torch.tensor(MASS).double(), torch.zeros(7).double()
    for part, number in outcomes(MASS, k):
        uniform(number)
        index, weight = wta_crs_sample(probabilities, k)
        total.index_add_(0, index, part * weight)
    torch.testing.assert_close(total, (probabilities > 0).double())


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_products_are_unbiased(k: int, uniform: Callable[[float], None]) -> None:
    input, other = torch.randn(7, 3).double(), torch.randn(7, 2).double()
    for given_mass in (None, torch.tensor(MASS).double() + 0.1):
        norms = input.norm(dim=1) * other.norm(dim=1)
        mass = (norms if given_mass is None else given_mass).tolist()
        total = torch.zeros(3, 2).double()
        for part, number in outcomes(mass, k):
            uniform(number)
            total += part * wta_crs_matmul(input, other, k, probabilities=given_mass)
        torch.testing.assert_close(total, input.t() @ other)


@pytest.mark.parametrize("scores", [None, torch.tensor([1.0, 5.0, 0.2, 1.0, 3.0, 1.0, 2.0])])
def test_gradients_of_the_weight_are_unbiased(
    scores: Tensor | None, uniform: Callable[[float], None]
) -> None:
    layer = WTACRSLinear(3, 2, sample_ratio=0.6, min_samples=1, dtype=torch.float64)
    input, grad = torch.randn(7, 3).double(), torch.randn(7, 2).double()
    mass = input.norm(dim=1) if scores is None else input.norm(dim=1) * scores
    total = torch.zeros(2, 3).double()
    for part, number in outcomes(mass.tolist(), 4):
        uniform(number)
        (found,) = torch.autograd.grad(layer(input, scores), layer.weight, grad)
        total += part * found
    torch.testing.assert_close(total, grad.t() @ input)


def test_draws_have_their_probabilities_and_are_independent() -> None:
    """Chi-square tests, whose false alarms are one in a million."""
    mass, k = [9.0, 2.0, 2.0, 1.5, 1.0, 1.5], 4
    winners, rest, shares = winners_of(mass, k)
    assert winners == [0]
    generator = torch.Generator().manual_seed(3)
    drawn = torch.stack(
        [wta_crs_sample(torch.tensor(mass), k, generator=generator)[0][1:] for _ in range(3000)]
    )
    counts = [(drawn == row).sum().item() for row in range(1, 6)]
    total = sum(counts)
    assert total == drawn.numel()
    expected = [float(shares[row] / rest) * total for row in range(1, 6)]
    assert stats.chisquare(counts, expected).pvalue > FALSE_ALARM
    table = [
        [((drawn[:, 0] == a) & (drawn[:, 1] == b)).sum().item() for a in (1, 2, 5)]
        for b in (1, 2, 5)
    ]
    assert stats.chi2_contingency(table).pvalue > FALSE_ALARM
    # A sampler that takes roots of the probabilities fails, as one that draws without replacement.
    roots = torch.tensor(mass[1:]).sqrt()
    biased = torch.multinomial(roots, total, replacement=True, generator=generator) + 1
    counts = [(biased == row).sum().item() for row in range(1, 6)]
    assert stats.chisquare(counts, expected).pvalue < FALSE_ALARM
    apart = torch.multinomial(torch.tensor(mass[1:]).expand(3000, 5), 2, generator=generator) + 1
    table = [
        [((apart[:, 0] == a) & (apart[:, 1] == b)).sum().item() for a in (1, 2, 5)]
        for b in (1, 2, 5)
    ]
    assert stats.chi2_contingency(table).pvalue < FALSE_ALARM


def test_the_generator_decides() -> None:
    mass = torch.rand(50)
    first, again, other = (
        wta_crs_sample(mass, 20, generator=torch.Generator().manual_seed(seed))[0]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(3)
    default = wta_crs_sample(mass, 20)[0]
    torch.manual_seed(3)
    assert torch.equal(wta_crs_sample(mass, 20)[0], default)


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
def test_dtypes_and_strides(dtype: torch.dtype) -> None:
    input, other = torch.randn(4, 18).to(dtype).t()[::2], torch.randn(9, 3).to(dtype)
    before = input.clone()
    mass = (torch.rand(9) + 0.1).to(dtype)
    generators = [torch.Generator().manual_seed(1) for _ in range(3)]
    index, weight = wta_crs_sample(mass, 5, generator=generators[0])
    assert weight.dtype == dtype
    _, exact = wta_crs_sample(mass.double(), 5, generator=generators[1])
    actual = wta_crs_matmul(input, other, 5, probabilities=mass, generator=generators[2])
    assert actual.dtype == dtype
    truth = (exact[:, None] * input.double()[index]).t() @ other.double()[index]
    rtol, atol = (0.02, 0.05) if dtype in HALF else (1e-5, 1e-5)
    torch.testing.assert_close(actual.double(), truth, rtol=rtol, atol=atol)
    assert torch.equal(input, before)
    mixed = wta_crs_matmul(input, other.float(), 9)
    assert mixed.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(mixed, input.to(mixed.dtype).t() @ other.to(mixed.dtype))


def test_corners() -> None:
    assert wta_crs_sample(torch.zeros(0), 2)[0].shape == (0,)
    assert torch.equal(wta_crs_matmul(torch.ones(0, 2), torch.ones(0, 3), 4), torch.zeros(2, 3))
    zeros = wta_crs_matmul(torch.zeros(5, 2), torch.randn(5, 3), 2)
    assert torch.equal(zeros, torch.zeros(2, 3))
    index, weight = wta_crs_sample(torch.tensor([0.0, 0.0, 3.0, 0.0]), 2)
    assert index[0] == 2
    assert weight.tolist() == [1.0, 0.0]
    rows = torch.tensor([[torch.inf], [1.0], [torch.nan], [torch.inf]])  # of mass 0 but for one
    mass = torch.tensor([0.0, 1.0, 0.0, 0.0])
    assert wta_crs_matmul(rows, torch.ones(4, 1), 2, probabilities=mass) == 1
    for bad in (torch.nan, torch.inf):
        assert wta_crs_sample(torch.tensor([1.0, bad, 1.0]), 2)[1].isnan().all()
    tiny = torch.full((4096,), 1e-30)  # whose float32 sum is lost beside 1
    tiny[7] = 1.0
    index, weight = wta_crs_sample(tiny, 8)
    assert index[0] == 7
    assert (weight[1:] > 100).all()
    assert weight.isfinite().all()


def test_gradients_of_products() -> None:
    input = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    other = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    mass = torch.rand(6, dtype=torch.float64, requires_grad=True)

    def run(input: Tensor, other: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return wta_crs_matmul(input, other, 4, probabilities=mass, generator=generator)

    assert torch.autograd.gradcheck(run, (input, other))
    assert torch.autograd.gradgradcheck(run, (input, other))


def a_pair(**options: Any) -> tuple[WTACRSLinear, nn.Linear]:
    """A layer of 5 features that keeps 6 of 20 rows, and the exact one."""
    torch.manual_seed(7)
    plain = nn.Linear(5, 3, dtype=options.get("dtype"))
    layer = WTACRSLinear(5, 3, **{"min_samples": 2, **options})
    layer.load_state_dict(plain.state_dict(), strict=True)
    return layer, plain


def gradients(layer: nn.Module, input: Tensor, grad: Tensor) -> list[Tensor]:
    for tensor in (input, *layer.parameters()):
        tensor.grad = None
    output = layer(input)
    output.backward(grad)
    return [output.detach(), input.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("shape", [(20, 5), (2, 10, 5), (2, 1, 10, 5)])
def test_layer(shape: tuple[int, ...]) -> None:
    layer, plain = a_pair(generator=torch.Generator().manual_seed(9))
    assert isinstance(layer, nn.Linear)
    input = torch.randn(shape, requires_grad=True)
    grad = torch.randn(*shape[:-1], 3)
    scores = torch.rand(20)
    actual, expected = gradients(layer, input, grad), gradients(plain, input, grad)
    for place in (0, 1, 3):
        assert torch.equal(actual[place], expected[place])
    for given_scores in (None, scores):
        mass = input.detach().reshape(20, 5).norm(dim=1).double()
        mass = mass if given_scores is None else mass * given_scores
        index, weight = wta_crs_sample(mass, 6, generator=torch.Generator().manual_seed(9))
        kept = weight[:, None] * input.detach().reshape(20, 5)[index]
        truth = grad.reshape(20, 3)[index].double().t() @ kept
        layer.generator = torch.Generator().manual_seed(9)
        (found,) = torch.autograd.grad(layer(input, given_scores), layer.weight, grad)
        torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)
        assert (found - expected[2]).abs().max() > 0.01


def test_how_many_rows_are_kept() -> None:
    def kept(rows: int, **options: Any) -> int:
        layer, _ = a_pair(**options)
        shapes = []

        def pack(tensor: Tensor) -> Tensor:
            shapes.append(tensor.shape)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(torch.randn(rows, 5))
        (shape,) = (shape for shape in shapes if len(shape) == 2 and shape != (3, 5))
        return shape[0]

    assert kept(20) == 6
    assert kept(20, sample_ratio=0.5) == 10
    assert kept(21, sample_ratio=0.5) == 10
    assert kept(20, min_samples=9) == 9
    assert kept(20, min_samples=21) == kept(20, sample_ratio=1.0) == 20
    assert kept(1000) == 300


def test_exact_where_nothing_is_sampled() -> None:
    input, grad = torch.randn(20, 5, requires_grad=True), torch.randn(20, 3)
    for options in ({"sample_ratio": 1.0}, {"min_samples": 20}):
        layer, plain = a_pair(**options)
        assert all(map(torch.equal, gradients(layer, input, grad), gradients(plain, input, grad)))
    layer, plain = a_pair()
    state = torch.get_rng_state()
    layer.eval()
    assert all(map(torch.equal, gradients(layer, input, grad), gradients(plain, input, grad)))
    layer.train()
    with torch.no_grad():
        assert torch.equal(layer(input), plain(input))
    layer.weight.requires_grad_(False)
    layer(input).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    layer, plain = a_pair()
    for shape in ((5,), (1, 5), (0, 5), (2, 0, 5)):
        some = torch.randn(shape)
        assert torch.equal(layer(some), plain(some))
        layer(some).sum().backward()


def test_all_rows_0() -> None:
    layer, _ = a_pair()
    layer(torch.zeros(20, 5)).sum().backward()
    assert torch.equal(layer.weight.grad, torch.zeros(3, 5))
    layer(torch.randn(20, 5), torch.zeros(20)).sum().backward()  # uniform
    assert layer.weight.grad.abs().sum() > 0
    bad = torch.randn(20, 5)
    bad[3] = torch.nan
    layer(bad)[0].sum().backward()
    assert layer.weight.grad.isnan().any()


def test_the_input_is_not_kept() -> None:
    layer = WTACRSLinear(64, 8, sample_ratio=0.1)
    input = torch.randn(1000, 64)
    alive, number = weakref.ref(input), 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal number
        number += 0 if tensor.shape == layer.weight.shape else tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = layer(input)
    assert 100 * 64 <= number <= 100 * 64 + 1000
    del input
    assert alive() is None
    output.sum().backward()


def test_peak_memory() -> None:
    """Of several layers, each of which frees its input but for a tenth."""

    def peak(kind: type[nn.Linear], **options: Any) -> int:
        torch.manual_seed(1)
        layers = [kind(64, 64, **options) for _ in range(8)]
        input = torch.randn(1000, 64)
        parameters = [p for layer in layers for p in layer.parameters()]
        with Memory(input, *parameters) as memory:
            hidden = input
            for layer in layers:
                hidden = layer(hidden)
            hidden.sum().backward()
        return memory.peak

    exact, sampled = peak(nn.Linear), peak(WTACRSLinear, sample_ratio=0.1)
    assert exact > 8 * 1000 * 64 * 4
    assert sampled < 0.55 * exact


class Once:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor

    def take(self) -> Tensor:
        tensor, self.tensor = self.tensor, None
        assert tensor is not None, "unpacked twice"
        return tensor


@pytest.mark.untyped
def test_saved_tensors() -> None:
    layer, _ = a_pair()
    input, grad = torch.randn(20, 5, requires_grad=True), torch.randn(20, 3)

    def hooked(input: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(Once, Once.take):
            return layer(input)

    def offloaded(input: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return layer(input)

    found = []
    for run in (
        layer,
        hooked,
        offloaded,
        lambda input: checkpoint(layer, input, use_reentrant=True),
        lambda input: checkpoint(layer, input, use_reentrant=False),
    ):
        torch.manual_seed(1)
        layer.zero_grad()
        input.grad = None
        run(input).backward(grad)
        found.append([input.grad, layer.weight.grad, layer.bias.grad])
    for one in found[1:]:
        assert all(map(torch.equal, one, found[0]))


def test_checkpoints_with_a_generator_are_consistent() -> None:
    """They keep and multiply the rows of the second draw."""
    layer, _ = a_pair(generator=torch.Generator().manual_seed(2))
    input, grad = torch.randn(20, 5), torch.randn(20, 3)
    checkpoint(layer, input, use_reentrant=False).backward(grad)
    again, _ = a_pair(generator=torch.Generator().manual_seed(2))
    again(input)
    again(input).backward(grad)
    assert torch.equal(layer.weight.grad, again.weight.grad)


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
def test_under_autocast(dtype: torch.dtype) -> None:
    """As ``nn.Linear``, in results and in what is kept."""
    layer, plain = a_pair(dtype=dtype)
    input, grad = torch.randn(20, 5).to(dtype).requires_grad_(), torch.randn(20, 3)
    with torch.autocast("cpu", torch.bfloat16):
        output, expected = layer(input), plain(input)
    assert output.dtype == expected.dtype
    assert torch.equal(output, expected)
    ours, theirs = (
        torch.autograd.grad(one, (input, kind.weight, kind.bias), grad.to(one.dtype))
        for one, kind in ((output, layer), (expected, plain))
    )
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[2], theirs[2])
    assert ours[1].dtype == dtype


def test_operations() -> None:
    """Those of the output once, and backward those of the input and of the kept rows."""
    layer, _ = a_pair()
    input = torch.randn(20, 5, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        output = layer(input)
        forward = counter.get_total_flops()
        output.sum().backward()
    assert forward == 2 * 20 * 5 * 3
    assert counter.get_total_flops() - forward == 2 * 20 * 5 * 3 + 2 * 6 * 5 * 3


def test_second_derivatives() -> None:
    layer, _ = a_pair(dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    input = torch.randn(20, 5, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(20, 3, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(3, 5, dtype=torch.float64)
    mass = input.detach().norm(dim=1)
    index, weight = wta_crs_sample(mass, 6, generator=torch.Generator().manual_seed(4))
    (found,) = torch.autograd.grad(layer(input), layer.weight, grad, create_graph=True)
    expected = grad[index].t() @ (weight[:, None] * input[index])
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad((found * probe).sum(), (input, grad)),
        torch.autograd.grad((expected * probe).sum(), (input, grad)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)

    def run(input: Tensor, bias: Tensor) -> Tensor:
        layer.generator = torch.Generator().manual_seed(4)
        tensors = {"weight": layer.weight, "bias": bias}
        return torch.func.functional_call(layer, tensors, (input,))

    assert torch.autograd.gradcheck(run, (input, layer.bias))


@pytest.mark.untyped
def test_transforms() -> None:
    layer, plain = a_pair()
    inputs = torch.randn(4, 20, 5)
    batched = torch.func.vmap(layer, randomness="different")(inputs)
    torch.testing.assert_close(batched, plain(inputs))

    def loss(tensors: dict[str, Tensor], input: Tensor) -> Tensor:
        return torch.func.functional_call(layer, tensors, (input,)).square().sum()

    tensors = {name: tensor.detach() for name, tensor in layer.named_parameters()}
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="different")(
        tensors, inputs
    )
    torch.testing.assert_close(per_sample["bias"], 2 * plain(inputs).sum(1))
    assert (per_sample["weight"] - 2 * plain(inputs).mT @ inputs).abs().max() > 0.01
    vectors = torch.randn(2, 20, 3)
    output = layer(inputs[0])
    (together,) = torch.autograd.grad(
        output, layer.weight, vectors, retain_graph=True, is_grads_batched=True
    )
    for one, vector in zip(together, vectors, strict=True):
        (apart,) = torch.autograd.grad(output, layer.weight, vector, retain_graph=True)
        torch.testing.assert_close(one, apart)


@pytest.mark.untyped
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles(dynamic: bool) -> None:
    layer, plain = a_pair()
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    input = torch.randn(20, 5, requires_grad=True)
    output = compiled(input)
    torch.testing.assert_close(output, plain(input))
    output.sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((3,), 20.0))
    product = torch.compile(wta_crs_matmul, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert product(torch.randn(9, 3), torch.randn(9, 2), 4).shape == (3, 2)


def test_copies() -> None:
    layer, plain = a_pair(generator=torch.Generator().manual_seed(5))
    expected = "in_features=5, out_features=3, bias=True, sample_ratio=0.3, min_samples=2"
    assert layer.extra_repr() == expected
    assert layer.state_dict().keys() == plain.state_dict().keys()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other.generator.get_state(), layer.generator.get_state())
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    plain.load_state_dict(torch.load(file, weights_only=True))
    assert WTACRSLinear(5, 3, False).bias is None


@pytest.mark.untyped
def test_bad_input() -> None:
    mass = torch.ones(3)
    for k in (0, -1):
        with pytest.raises(ValueError, match="wta_crs_sample: k must be an int of at least 1"):
            wta_crs_sample(mass, k)
        with pytest.raises(ValueError, match="wta_crs_matmul: k must be an int of at least 1"):
            wta_crs_matmul(mass[:, None], mass[:, None], k)
    with pytest.raises(TypeError, match="wta_crs_sample: k must be an int"):
        wta_crs_sample(mass, 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"wta_crs_sample: probabilities must be of shape \(n\)"):
        wta_crs_sample(torch.ones(3, 1), 2)
    with pytest.raises(TypeError, match="wta_crs_sample: probabilities must be a floating-point"):
        wta_crs_sample(mass.int(), 2)
    rows = torch.ones(3, 2)
    for bad in (torch.tensor([1.0, -1.0, 1.0]), torch.zeros(3)):
        for k in (2, 5):
            with pytest.raises(
                ValueError, match="wta_crs_sample: probabilities must be at least 0"
            ):
                wta_crs_sample(bad, k)
        with pytest.raises(ValueError, match="wta_crs_matmul: probabilities must be at least 0"):
            wta_crs_matmul(rows, rows, 2, probabilities=bad)
    with pytest.raises(ValueError, match=r"wta_crs_matmul: probabilities must be of shape \(3,\)"):
        wta_crs_matmul(rows, rows, 2, probabilities=torch.ones(2))
    with pytest.raises(
        ValueError, match="wta_crs_matmul: other must be of 2 dimensions and as man"
    ):
        wta_crs_matmul(rows, torch.ones(4, 2), 2)
    with pytest.raises(
        ValueError, match="wta_crs_matmul: input must be of 2 dimensions and as man"
    ):
        wta_crs_matmul(mass, rows, 2)
    with pytest.raises(ValueError, match="wta_crs_matmul: other must lie on the device of input"):
        wta_crs_matmul(rows, torch.ones(3, 2, device="meta"), 2)
    with pytest.raises(TypeError, match="wta_crs_matmul: input must be a floating-point tensor"):
        wta_crs_matmul(rows.int(), rows, 2)


@pytest.mark.untyped
def test_bad_layers() -> None:
    for ratio in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="WTACRSLinear: sample_ratio must be a number above 0"):
            WTACRSLinear(3, 2, sample_ratio=ratio)
    with pytest.raises(ValueError, match="WTACRSLinear: min_samples must be an int of at least 1"):
        WTACRSLinear(3, 2, min_samples=0)
    with pytest.raises(TypeError, match="positional"):
        WTACRSLinear(3, 2, True, None, None, 0.3)  # type: ignore[misc]
    layer, _ = a_pair()
    input = torch.randn(20, 5)
    for evaluate in (False, True):
        layer.train(not evaluate)
        with pytest.raises(ValueError, match=r"WTACRSLinear: row_scores must be of shape \(20,\)"):
            layer(input, torch.ones(19))
        with pytest.raises(ValueError, match="WTACRSLinear: row_scores must be at least 0"):
            layer(input, -torch.ones(20))
        with pytest.raises(TypeError, match="WTACRSLinear: row_scores must be a floating-point"):
            layer(input, torch.ones(20).int())


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            wta_crs_sample,
            lambda: {"probabilities": draw(7).abs() + 0.1},
            options=({"k": 3},),
        ),
        Call(
            wta_crs_matmul,
            lambda: {"input": draw(7, 4), "other": draw(7, 3)},
            differentiable=("input", "other"),
            options=({"k": 5},),
        ),
    ]
