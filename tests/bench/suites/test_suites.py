import pytest
import torch

from tilework._implementations import TABLES
from tilework.bench import runner, scaling, suites
from tilework.bench.suites import Case


def test_suites_are_discovered_by_file() -> None:
    found = suites.discover()
    assert "linear_cross_entropy" in found
    assert all(suite.name == name for name, suite in found.items())


def test_the_most_important_suites_come_first() -> None:
    flagships = ["linear_cross_entropy", "block_sparse_attention", "norms"]
    found = suites.discover()
    assert list(found)[:3] == flagships
    for device in ("cpu", "cuda"):
        jobs = runner.most_important_first(
            runner.plan(found.values(), torch.device(device), quick=True)
        )
        assert list(dict.fromkeys(job.suite.name for job in jobs))[:3] == flagships
        assert jobs[0].suite.name == "linear_cross_entropy"


@pytest.mark.parametrize("suite", suites.discover().values(), ids=lambda suite: suite.name)
def test_every_suite_is_complete(suite: suites.Suite) -> None:
    names = [candidate.name for candidate in suite.candidates]
    assert len(set(names)) == len(names)
    assert suite.composition in names
    for device in ("cpu", "cuda"):
        cases = suite.cases(device)
        assert len({case.name for case in cases}) == len(cases)
        assert {case.quick for case in cases} == {True, False}
        for case in cases:
            assert suite.flops(case) > 0
            assert suite.traffic(case, torch.bfloat16) < suite.traffic(case, torch.float32)
    for growth in suite.growth:
        sizes = [case.sizes[growth.over] for case in growth.cases]
        assert sizes == sorted(set(sizes))
        assert len(sizes) >= scaling.FEWEST
        work = [suite.flops(case) for case in growth.cases]
        assert work[-1] >= scaling.TWO_ORDERS * work[0]
    for candidate in suite.candidates:
        assert (candidate.package is None) == (candidate.distribution is None)


def test_implementations_say_which_is_the_default_and_why_one_cannot_run() -> None:
    table = TABLES["losses.linear_kl_div"]
    inputs = {"target": torch.zeros(1, dtype=torch.int64), "input": torch.zeros(1)}
    candidates = suites.implementations("losses.linear_kl_div", lambda *_: dict)
    assert [one.name for one in candidates] == [f"tilework {entry.name}" for entry in table]
    by_name = {one.name: one for one in candidates}
    assert not any(one.peer for one in candidates)
    assert by_name["tilework tiled"].bind(Case("", {}), inputs).default
    assert not by_name["tilework reference"].bind(Case("", {}), inputs).default
    with pytest.raises(suites.Unavailable, match="it runs on cuda, not on cpu"):
        by_name["tilework triton"].bind(Case("", {}), inputs)
    with pytest.raises(suites.Unavailable, match=r"it takes .* not float8_e4m3fn"):
        by_name["tilework tiled"].bind(
            Case("", {}), {"input": torch.zeros(1).to(torch.float8_e4m3fn)}
        )


def test_the_default_follows_from_what_a_case_gives() -> None:
    def defaults(suite: str, kind: str, dtype: torch.dtype = torch.float32) -> list[str]:
        found = suites.discover()[suite]
        case = next(case for case in found.cases("cpu") if case.quick and kind in case.kind)
        inputs = found.inputs(case, dtype, torch.device("cpu"))
        ours = [one for one in found.candidates if not one.peer and "filter" not in one.name]
        steps = [one.bind(case, inputs) for one in ours if "cuda" not in one.devices]
        return [step.kernel.rpartition(" ")[2] for step in steps if step.default]

    assert defaults("linear_cross_entropy", "backward") == ["chunked"]
    assert defaults("linear_cross_entropy", "backward", torch.float16) == ["tiled"]
    assert defaults("norms", "rms backward") == ["torch"]
    assert defaults("norms", "layer backward") == ["torch"]
    assert defaults("norms", "layer backward", torch.bfloat16) == ["tiled"]
    for suite in ("block_sparse_attention", "block_sparse_decode"):
        assert defaults(suite, "") == ["tiled"]


def test_what_an_implementation_refuses_is_unavailable() -> None:
    candidates = suites.implementations(
        "attention.block_sparse_attention",
        lambda *_: dict,
        lambda *_: {"block_size": (64, 64), "features": 300, "values": 8},
    )
    inputs = {"query": torch.zeros(1)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        with pytest.raises(suites.Unavailable, match="it takes 1 to 256 features, got 300"):
            candidates[0].build(Case("", {}), inputs)


def test_the_kind_of_a_case_chooses_the_operator() -> None:
    operators = {"one": "attention.block_sparse_decode", "two": "attention.attention_entropy"}
    candidates = suites.by_kind(
        {kind: suites.implementations(name, lambda *_: dict) for kind, name in operators.items()}
    )
    assert [one.name for one in candidates] == [
        "tilework triton",
        "tilework tiled",
        "tilework reference",
    ]
    inputs = {"input": torch.zeros(1)}
    for kind, name in operators.items():
        steps = [one.bind(Case(kind, {}), inputs) for one in candidates[1:]]
        assert [step.kernel for step in steps] == [
            f"tilework {name} tiled",
            f"tilework {name} reference",
        ]
        with pytest.raises(suites.Unavailable, match="it runs on cuda, not on cpu"):
            candidates[0].bind(Case(kind, {}), inputs)


def test_gradients_are_those_of_the_inputs_that_require_one() -> None:
    inputs = {"a": torch.tensor(3.0, requires_grad=True), "b": torch.tensor(2.0)}
    results = suites.loss_and_gradients(lambda: inputs["a"] ** 2 * inputs["b"], inputs)()
    assert {name: float(value) for name, value in results.items()} == {"loss": 18, "grad a": 12}
    assert not results["loss"].requires_grad

    without = {"a": torch.tensor(3.0)}
    assert suites.loss_and_gradients(lambda: without["a"] ** 2, without)() == {"loss": 9}


def test_the_core_operators_grow_in_each_of_their_sizes() -> None:
    found = suites.discover()
    grown = {name: {growth.over for growth in suite.growth} for name, suite in found.items()}
    assert grown["linear_cross_entropy"] == {"N", "V"}
    assert grown["norms"] == {"M", "N"}
    assert grown["block_sparse_attention"] == {"L", "K"}
    assert grown["block_sparse_decode"] == {"S", "K"}
    assert grown["block_pooled_attention"] == {"L"}
    assert grown["losses"] == {"N", "C"}


def test_a_package_that_needs_more_than_its_name_says_so() -> None:
    for name, how in suites.INSTALL.items():
        peer = suites.Candidate("peer", lambda *_: None, package="no_such", distribution=name)
        with pytest.raises(suites.Unavailable, match="is not installed") as error:
            peer.bind(Case("", {}), {"input": torch.zeros(1)})
        assert how in str(error.value)
