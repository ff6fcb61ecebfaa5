import math

import pytest
import torch

from tilework.bench import accuracy


def test_the_error_is_the_larger_of_two_norms() -> None:
    truth = {"r": torch.ones(100, dtype=torch.float64)}
    one_wrong = truth["r"].clone()
    one_wrong[7] = 1.5
    assert accuracy.errors({"r": one_wrong}, truth)["r"] == pytest.approx(0.5)

    # Small elements that are lost do not show beside a large one in the maximum norm.
    skewed = {"r": torch.cat([torch.full((10_000,), 0.1), torch.ones(1)]).double()}
    lost = {"r": skewed["r"].masked_fill(skewed["r"] < 1, 0)}
    assert accuracy.errors(lost, skewed)["r"] == pytest.approx(math.sqrt(100 / 101))


def test_errors_of_a_zero_truth_are_absolute() -> None:
    truth = {"r": torch.zeros(3, dtype=torch.float64)}
    assert accuracy.errors({"r": torch.zeros(3)}, truth) == {"r": 0}
    assert accuracy.errors({"r": torch.full((3,), 2.0)}, truth)["r"] == pytest.approx(2 * 3**0.5)


@pytest.mark.parametrize(
    "results",
    [
        {},
        {"s": torch.ones(3)},
        {"r": torch.ones(2)},
        {"r": torch.ones(3), "s": torch.ones(3)},  # without a truth
    ],
)
def test_a_missing_misshapen_or_unknown_result_is_an_error(
    results: dict[str, torch.Tensor],
) -> None:
    with pytest.raises(ValueError, match="the truth has"):
        accuracy.errors(results, {"r": torch.ones(3, dtype=torch.float64)})


def test_limits_follow_the_composition_and_have_a_floor() -> None:
    results = {"r": torch.ones(3)}
    eps = torch.finfo(torch.float32).eps
    ours = accuracy.limits(results, {"r": 1e-3}, torch.float32, accuracy.OURS)
    assert ours["r"] == pytest.approx(2e-3 + eps, rel=1e-6)
    lucky = accuracy.limits(results, {"r": 0.0}, torch.float32, accuracy.OURS)
    assert lucky["r"] == pytest.approx(2 * eps)
    peer = accuracy.limits(results, {"r": 1e-3}, torch.float32, accuracy.PEER)
    assert peer["r"] == pytest.approx(1e-2 + 4 * eps, rel=1e-6)


def test_rounding_units_are_those_of_the_result_and_luck_that_of_the_case() -> None:
    results = {"wide": torch.ones(3), "narrow": torch.ones(3, dtype=torch.bfloat16)}
    wide, narrow = (torch.finfo(dtype).eps for dtype in (torch.float32, torch.bfloat16))
    limits = accuracy.limits(results, {}, torch.bfloat16, accuracy.OURS)
    assert limits == {"wide": narrow + wide, "narrow": 2 * narrow}
    limits = accuracy.limits(results, {}, torch.float32, accuracy.PEER)
    assert limits == {"wide": 9 * wide, "narrow": 5 * wide + 4 * narrow}
    assert accuracy.composition_limits(results, torch.bfloat16) == dict.fromkeys(
        results, narrow**0.5
    )


def test_an_error_has_the_precision_of_the_truth_and_leaves_the_result_alone() -> None:
    result = torch.full((3,), 1.0 + 2**-20, requires_grad=True)
    truth = {"r": torch.ones(3, dtype=torch.float64)}
    assert accuracy.errors({"r": result}, truth)["r"] == pytest.approx(2**-20, rel=1e-9)
    exact = torch.ones(3, dtype=torch.float64)
    assert accuracy.errors({"r": exact}, {"r": exact * 2})["r"] == pytest.approx(0.5)
    assert (exact == 1).all()


@pytest.mark.parametrize(
    ("error", "refused"),
    [(0.0, False), (1.0, False), (1.01, True), (math.nan, True), (math.inf, True)],
)
def test_an_error_above_its_limit_is_objected_to(error: float, refused: bool) -> None:
    reason = accuracy.objection({"r": error}, {"r": 1.0})
    assert (reason is not None) == refused
    assert reason is None or "error of r" in reason
