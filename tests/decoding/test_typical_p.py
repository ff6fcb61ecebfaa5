import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tilework.decoding import TypicalP, typical_p

import samples
from calls import Call, draw
from helpers import DEVICES, FLOATING, clones


def kept_by_loops(row: Sequence[float], mass: float, least: int = 1) -> list[int]:
    """The definition on one row; the kept tokens in their order."""
    peak = max(row)
    log_sum = peak + math.log(math.fsum(math.exp(logit - peak) for logit in row))
    surprise = {v: log_sum - logit for v, logit in enumerate(row) if logit > -math.inf}
    entropy = math.fsum(math.exp(-s) * s for s in surprise.values())
    order = sorted(surprise, key=lambda v: (abs(surprise[v] - entropy), v))
    for length in range(least, len(order)):
        if mass < 1 and math.fsum(math.exp(-surprise[v]) for v in order[:length]) >= mass:
            return order[:length]
    return order


def expected(logits: Tensor, masses: Sequence[float], least: int = 1) -> Tensor:
    result = torch.full_like(logits, -torch.inf)
    for row, (values, mass) in enumerate(zip(logits.tolist(), masses, strict=True)):
        kept = kept_by_loops(values, mass, least)
        result[row, kept] = logits[row, kept]
    return result


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mass", [0.05, 0.2, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("dtype", FLOATING)
def test_against_loops(dtype, mass, device):
    torch.use_deterministic_algorithms(device == "cpu")  # CUDA sums prefixes in any order
    for vocabulary in (1, 7, 63, 100):
        for spread in (0.1, 1.0, 4.0):
            logits = (spread * torch.randn(5, vocabulary)).to(device, dtype)
            for least in (1, 3):
                actual = typical_p(logits, mass, min_tokens_to_keep=least)
                assert actual.dtype == dtype
                assert torch.equal(actual, expected(logits, [mass] * 5, least))


@pytest.mark.parametrize("mass_dtype", FLOATING)
@pytest.mark.parametrize("dtype", FLOATING)
def test_a_mass_for_each_row(dtype, mass_dtype):
    logits = torch.randn(6, 50).to(dtype)
    mass = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9, 1.0]).to(mass_dtype)
    actual = typical_p(logits, mass)
    assert torch.equal(actual, expected(logits, mass.tolist()))
    assert torch.equal(TypicalP(mass)(torch.zeros(6, 1, dtype=torch.int64), logits), actual)
    assert len({int(kept) for kept in actual.isfinite().sum(1)}) == 6


@settings(deadline=None, max_examples=100)
@given(vocabulary=st.integers(1, 130), mass=st.floats(1e-3, 1), value=st.floats(-1e4, 1e4))
@example(vocabulary=100, mass=0.07, value=0.0)  # 0.07 is a little above seven hundredths
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_row_keeps_the_smallest_indices(dtype, vocabulary, mass, value):
    """Deviation from transformers, which keeps every token that ties with the last one."""
    kept = typical_p(torch.full((1, vocabulary), value, dtype=dtype), mass).isfinite()[0]
    count = math.ceil(mass * vocabulary)
    assert kept.tolist() == [True] * count + [False] * (vocabulary - count)
    rows = torch.full((2, vocabulary), value, dtype=dtype)
    masses = torch.tensor([mass, 1.0], dtype=torch.float64)
    assert typical_p(rows, masses).isfinite().sum(1).tolist() == [count, vocabulary]


@pytest.mark.parametrize("mass", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("dtype", FLOATING)
def test_equal_tokens_go_by_index(dtype, mass):
    logits = torch.randint(3, (20, 63)).to(dtype)
    assert torch.equal(typical_p(logits, mass), expected(logits, [mass] * 20))


@settings(deadline=None, max_examples=100)
@given(
    vocabulary=st.sampled_from((1, 2, 7, 63, 100)),
    seed=st.integers(0, 2**31),
    spread=st.floats(0, 10),
    mass=st.floats(1e-3, 1),
    least=st.integers(1, 5),
    constant=st.integers(-64, 64),
)
def test_properties(vocabulary, seed, spread, mass, least, constant):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, vocabulary, dtype=torch.float64, generator=generator) * spread
    logits = (logits * 2**20).round() / 2**20  # so that adding a constant is exact
    output = typical_p(logits, mass, min_tokens_to_keep=least)
    kept = output.isfinite()
    assert torch.equal(output[kept], logits[kept])
    assert (output[~kept] == -torch.inf).all()
    assert (kept.sum(1) >= min(least, vocabulary)).all()

    p = logits.softmax(1)
    distance = (p.log().neg() - torch.special.entr(p).sum(1, keepdim=True)).abs()
    for row in range(2):
        total = p[row][kept[row]].sum()
        assert total >= mass * (1 - 1e-12)
        last = distance[row].where(kept[row], -1).argmax()
        without = float(total - p[row, last])
        assert kept[row].sum() <= least or without < mass * (1 + 1e-12) or mass == 1
        furthest_kept, nearest_excluded = (
            distance[row].where(kept[row], -torch.inf).max(),
            distance[row].where(~kept[row], torch.inf).min(),
        )
        assert furthest_kept <= nearest_excluded + 1e-9

    shifted = typical_p(logits + constant, mass, min_tokens_to_keep=least)
    assert torch.equal(shifted.isfinite(), kept)


def test_the_most_probable_token_may_go():
    logits = torch.tensor([[0.5, 0.1, 0.1, 0.1, 0.1, 0.1]]).log()
    assert typical_p(logits, 0.2).isfinite()[0].tolist() == [True] + [False] * 5
    logits = torch.tensor([[0.45, 0.25, 0.15, 0.1, 0.05]]).log()
    assert typical_p(logits, 0.2).isfinite()[0].tolist() == [False, True, False, False, False]


@pytest.mark.parametrize("dtype", FLOATING)
def test_mass_one_excludes_nothing(dtype):
    logits = torch.cat((torch.randn(2, 1000) * 20, torch.full((2, 1), -1e4)), 1).to(dtype)
    assert torch.equal(typical_p(logits, 1.0), logits)
    assert torch.equal(typical_p(logits, torch.ones(2)), logits)


@pytest.mark.parametrize("dtype", FLOATING)
def test_excluded_tokens_stay_and_do_not_count(dtype):
    logits = torch.randn(4, 40).to(dtype)
    logits[:, ::2] = -torch.inf
    for mass in (0.3, 0.9, 1.0):
        actual = typical_p(logits, mass, min_tokens_to_keep=7)
        assert torch.equal(actual, expected(logits, [mass] * 4, 7))
        assert (actual.isfinite().sum(1) >= 7).all()
    few = logits.index_fill(1, torch.arange(3, 40), -torch.inf)
    assert torch.equal(typical_p(few, 0.1, min_tokens_to_keep=5), few)


@pytest.mark.parametrize("dtype", FLOATING)
def test_rows_without_a_distribution_come_back(dtype):
    logits = torch.randn(5, 9).to(dtype)
    expected_last = typical_p(logits[4:], 0.1)
    logits[0, 3] = torch.nan
    logits[1, 3] = torch.inf
    logits[2] = -torch.inf
    logits[3, 3], logits[3, 5] = torch.inf, -torch.inf
    actual = typical_p(logits, 0.1)
    torch.testing.assert_close(actual[:4], logits[:4], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(actual[4:], expected_last)


@pytest.mark.parametrize("dtype", FLOATING)
def test_extreme_logits(dtype):
    largest = min(1e4, torch.finfo(dtype).max)
    logits = torch.tensor([[largest, -largest, 0.0, largest - 64]]).to(dtype)
    assert typical_p(logits, 0.9).isfinite()[0].tolist() == [True, False, False, False]
    actual = typical_p(logits, 0.9, min_tokens_to_keep=2).isfinite()[0]
    assert actual.tolist() == [True, False, False, True]
    ends = torch.finfo(dtype).max
    logits = torch.tensor([[-ends, ends, 0.0]], dtype=dtype)
    assert typical_p(logits, 0.9).isfinite()[0].tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", FLOATING)
def test_strides_empty_batches_and_arguments(dtype):
    logits = torch.randn(30, 8).to(dtype)
    mass = torch.linspace(0.2, 0.9, 8)
    before = clones((logits, mass))
    actual = typical_p(logits.T, mass)
    assert torch.equal(actual, typical_p(logits.T.contiguous(), mass))
    row = logits[:, :1].T.expand(4, 30)
    assert torch.equal(typical_p(row, 0.5), typical_p(row.contiguous(), 0.5))
    typical_p(logits, 1.0).zero_()
    assert torch.equal(logits, before[0])
    assert torch.equal(mass, before[1])
    assert typical_p(logits[:0], 0.5).shape == (0, 8)
    assert typical_p(logits[:0], mass[:0]).shape == (0, 8)


def test_gradient_is_that_of_the_kept_logits():
    logits = torch.randn(3, 20, requires_grad=True)
    output = typical_p(logits, 0.5)
    upstream = torch.randn(3, 20)
    (grad,) = torch.autograd.grad(output, logits, upstream)
    assert torch.equal(grad, upstream.where(output.isfinite(), 0))


@pytest.mark.untyped
def test_transforms():
    logits = torch.randn(4, 3, 20)
    mass = torch.rand(4, 3)
    looped = torch.stack([typical_p(*pair) for pair in zip(logits, mass, strict=True)])
    assert torch.equal(torch.vmap(typical_p)(logits, mass), looped)
    shared = torch.vmap(typical_p, (1, None))(logits, mass[:, 0])
    assert torch.equal(shared[0], typical_p(logits[:, 0], mass[:, 0]))

    def kept_sum(logits):
        output = typical_p(logits, 0.5)
        return output.where(output.isfinite(), 0).square().sum()

    grads = torch.vmap(torch.func.grad(kept_sum))(logits)
    filtered = typical_p(logits.flatten(0, 1), 0.5).unflatten(0, (4, 3))
    assert torch.equal(grads, 2 * filtered.where(filtered.isfinite(), 0))

    compiled = torch.compile(typical_p, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, vocabulary in ((3, 20), (5, 33)):
        logits, mass = torch.randn(batch, vocabulary), torch.rand(batch)
        assert torch.equal(compiled(logits, 0.7), typical_p(logits, 0.7))
        assert torch.equal(compiled(logits, mass), typical_p(logits, mass))
    process = torch.compile(TypicalP(0.3), fullgraph=True, backend="aot_eager")
    tokens = torch.zeros(5, 1, dtype=torch.int64)
    assert torch.equal(process(tokens, logits), typical_p(logits, 0.3))


def test_reads_no_value():
    """A tensor without values gives an error wherever one is read, as a synchronization would."""
    logits = torch.empty(3, 20, device="meta")
    for mass in (0.5, torch.empty(3, device="meta")):
        assert typical_p(logits, mass, min_tokens_to_keep=2).shape == (3, 20)


@pytest.mark.gpu
def test_does_not_synchronize():
    torch.use_deterministic_algorithms(False)
    logits = torch.randn(3, 20, device="cuda")
    mass = torch.full((3,), 0.5, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        first, second = typical_p(logits, mass), typical_p(logits, 0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, second)


@pytest.mark.parametrize("mass", [0.1, 0.5, 0.9, 0.99])
def test_is_the_warper_of_transformers_without_ties(mass):
    from transformers import TypicalLogitsWarper

    logits = torch.randn(20, 101, dtype=torch.float64) * 3
    tokens = torch.zeros(20, 1, dtype=torch.int64)
    for least in (1, 4):
        theirs = TypicalLogitsWarper(mass, min_tokens_to_keep=least)(tokens, logits)
        ours = TypicalP(mass, min_tokens_to_keep=least)(tokens, logits)
        assert torch.equal(ours, theirs)

    uniform = torch.zeros(1, 8)
    assert TypicalLogitsWarper(0.25)(tokens[:1], uniform).isfinite().sum() == 8
    assert TypicalP(0.25)(tokens[:1], uniform).isfinite().sum() == 2


def test_drops_into_generate():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=31, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.transformer.wte.weight.mul_(50)
    tokens = torch.randint(1, 31, (3, 4))
    output = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        logits_processor=[TypicalP(0.3)],
        do_sample=True,
        top_k=0,
        max_new_tokens=6,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        pad_token_id=0,
    )
    for step, (scores, logits) in enumerate(zip(output.scores, output.logits, strict=True)):
        assert torch.equal(scores, typical_p(logits, 0.3))
        assert scores.isinf().any()
        running = (output.sequences[:, 4 : 4 + step] != 0).all(1)
        chosen = scores.gather(1, output.sequences[:, 4 + step, None])[:, 0]
        assert chosen[running].isfinite().all()


def test_representation():
    assert repr(TypicalP()) == "TypicalP()"
    assert repr(TypicalP(0.2, min_tokens_to_keep=3)) == "TypicalP(mass=0.2, min_tokens_to_keep=3)"


LOGITS = torch.zeros(2, 4)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("error", "match", "logits", "mass", "options"),
    [
        (TypeError, "logits must be a floating", LOGITS.long(), 0.5, {}),
        (TypeError, "logits must be a floating", [[0.0]], 0.5, {}),
        (ValueError, r"logits must be of shape \(B, V\)", LOGITS[0], 0.5, {}),
        (ValueError, r"logits must be of shape \(B, V\)", LOGITS[None], 0.5, {}),
        (ValueError, r"logits must be of shape \(B, V\)", LOGITS[:, :0], 0.5, {}),
        (TypeError, "mass must be a number", LOGITS, "0.5", {}),
        (TypeError, "mass must be a floating", LOGITS, torch.ones(2, dtype=torch.int64), {}),
        (ValueError, r"mass must be a number or of shape \(B,\)", LOGITS, torch.ones(3), {}),
        (ValueError, r"mass must be a number or of shape \(B,\)", LOGITS, torch.ones(2, 1), {}),
        (ValueError, r"mass must be a number or of shape \(B,\)", LOGITS, torch.tensor(0.5), {}),
        (TypeError, "min_tokens_to_keep must be an int", LOGITS, 0.5, {"min_tokens_to_keep": 1.0}),
        (ValueError, "min_tokens_to_keep must be", LOGITS, 0.5, {"min_tokens_to_keep": 0}),
    ],
)
def test_bad_input(error, match, logits, mass, options):
    with pytest.raises(error, match=f"typical_p: {match}"):
        typical_p(logits, mass, **options)


@pytest.mark.untyped
@pytest.mark.parametrize("mass", [0, 0.0, -0.1, 1.1, math.nan, math.inf])
def test_bad_mass(mass):
    match = "typical_p: mass must be a number above 0 and at most 1, got"
    for bad in (mass, torch.tensor([0.5, mass])):
        with pytest.raises(ValueError, match=match):
            typical_p(LOGITS, bad)
        with pytest.raises(ValueError, match=match):
            TypicalP(bad)
    with pytest.raises(ValueError, match="typical_p: min_tokens_to_keep"):
        TypicalP(0.5, min_tokens_to_keep=0)
    with pytest.raises(TypeError, match="positional"):
        TypicalP(0.5, 2)


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(typical_p, lambda: {"logits": draw(5, 7)}, options=({}, {"mass": 0.5})),
        Call(
            typical_p,
            lambda: {"logits": draw(5, 7), "mass": torch.rand(5).double().clamp(min=0.1)},
        ),
    ]
