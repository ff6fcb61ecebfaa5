import pytest
import torch
import torch.nn.functional as F

from tilework.bench import accuracy, runner
from tilework.bench.suites import Case, Unavailable
from tilework.bench.suites import block_sparse_decode as suite

CPU = torch.device("cpu")
KINDS = (suite.CONTIGUOUS, suite.PAGED)
TOKENS, BLOCKS = 256, 4


def case(kind: str, kept: int = 2) -> Case:
    return Case(kind, {"B": 3, "S": TOKENS, "H": 4, "G": 2, "E": 16, "K": kept})


def contiguous(inputs: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The cache token by token."""
    if "table" not in inputs:
        return inputs[name]
    result = inputs[name].new_empty(3, 2, TOKENS, 16)
    for row in range(3):
        for token in range(TOKENS):
            page = inputs["table"][row, token // 16]
            result[row, :, token] = inputs[name][page, token % 16]
    return result


@pytest.mark.parametrize("kept", [1, 2, BLOCKS])
@pytest.mark.parametrize("kind", KINDS)
def test_the_truth_is_attention_under_a_mask(kind: str, kept: int) -> None:
    inputs = suite.inputs(case(kind, kept), torch.float64, CPU)
    visible = torch.zeros(3, 4, 1, TOKENS, dtype=torch.bool)
    for row in range(3):
        for head in range(4):
            for block in inputs["blocks"][row, head // 2]:
                visible[row, head, 0, 64 * block : 64 * block + 64] = True
    assert int(visible.sum()) == 3 * 4 * kept * 64
    key, value = (contiguous(inputs, name) for name in ("key", "value"))
    expected = F.scaled_dot_product_attention(
        inputs["query"], key, value, attn_mask=visible, enable_gqa=True
    )
    truth = suite.truth(case(kind, kept), inputs)["output"]
    torch.testing.assert_close(truth, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kept", [2, BLOCKS])
@pytest.mark.parametrize("kind", KINDS)
def test_candidates_are_right_or_say_why_not(kind: str, kept: int, dtype: str) -> None:
    problem = case(kind, kept)
    inputs = suite.inputs(problem, getattr(torch, dtype), CPU)
    truth = suite.truth(problem, inputs)
    unavailable, default = set(), []
    for candidate in suite.SUITE.candidates:
        if "compiled" in candidate.name:
            continue
        try:
            step = candidate.bind(problem, inputs)
        except Unavailable:
            unavailable.add(candidate.name)
            continue
        errors = accuracy.errors(step.run(), truth)
        assert errors["output"] < 20 * torch.finfo(getattr(torch, dtype)).eps
        default += [candidate.name] * step.default
        if not candidate.peer:
            assert step.kernel.startswith(
                f"tilework attention.{'paged_' * (kind == suite.PAGED)}block_sparse_decode "
            )
    other = "torch sdpa (gathered)" if kept == BLOCKS else "torch sdpa (dense)"
    assert unavailable == {"tilework triton", other}
    assert default == ["tilework tiled"]


def test_flex_attention_knows_no_pages() -> None:
    flex = next(one for one in suite.SUITE.candidates if "flex" in one.name)
    with pytest.raises(Unavailable, match="not measured with pages"):
        flex.bind(case(suite.PAGED), suite.inputs(case(suite.PAGED), torch.float32, CPU))


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_the_same_on_every_call_and_pages_in_disorder(kind: str) -> None:
    first, again = (suite.inputs(case(kind), torch.bfloat16, CPU) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(tensor.requires_grad for tensor in first.values())
    if kind == suite.PAGED:
        pages = first["table"].flatten()
        assert sorted(pages.tolist()) == list(range(3 * TOKENS // 16))
        assert pages.tolist() != sorted(pages.tolist())


def test_costs_are_those_of_the_selected_tokens() -> None:
    tokens = 2 * 64
    assert suite.flops(case(suite.PAGED)) == 2 * 2 * 3 * 4 * 16 * tokens
    elements = 2 * 3 * 2 * tokens * 16 + 2 * 3 * 4 * 16
    assert suite.traffic(case(suite.PAGED), torch.bfloat16) == 2 * elements
    assert suite.traffic(case(suite.CONTIGUOUS), torch.float32) == 4 * elements


def test_cases_start_with_the_sizes_of_the_claims() -> None:
    names = [one.name for one in suite.cases("cuda")[:2]]
    assert names == [
        "contiguous B=8 S=131072 H=32 G=8 E=128 K=204",
        "contiguous B=1 S=131072 H=32 G=8 E=128 K=2048",
    ]
    assert suite.cases("cpu")[0].name == "contiguous B=8 S=16384 H=16 G=4 E=128 K=25"


@pytest.mark.untyped
def test_the_runner_refuses_an_output_that_is_wrong_by_a_percent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = runner.Job(suite.SUITE, case(suite.CONTIGUOUS), "float32")
    settings = runner.Settings(CPU, seconds=0, rounds=(2, 2), memory=False)
    right = suite.block_sparse_decode
    monkeypatch.setattr(suite, "block_sparse_decode", lambda *a, **o: 1.01 * right(*a, **o))
    rows = {row.candidate: row.status for row in runner.measure(job, settings)}
    assert rows["tilework tiled"] == "refused"
    assert rows["torch sdpa (gathered)"] == "ok"
    assert rows["torch flex_attention (compiled)"] == "ok"
