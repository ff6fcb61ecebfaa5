"""The suite of quantization: its truths, and its candidates."""

import pytest
import torch

from tilework.bench import accuracy
from tilework.bench.suites import Case, Unavailable
from tilework.bench.suites import quant as suite
from tilework.quant import gptq_quantize

CPU = torch.device("cpu")
LINEAR = Case("linear", {"N": 3, "O": 32, "I": 256})
GPTQ = Case("gptq", {"O": 24, "I": 256})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_truth_of_a_layer_is_the_product_with_its_levels(dtype: torch.dtype) -> None:
    inputs = suite.inputs(LINEAR, dtype, CPU)
    scale, zero = (
        inputs[name].double().repeat_interleave(128, 1) for name in ("scale", "zero_point")
    )
    weight = scale * (inputs["codes"].double() - zero)
    exact = torch.einsum("ni,oi->no", inputs["input"].double(), weight)
    torch.testing.assert_close(suite.truth(LINEAR, inputs)["output"], exact)


def test_the_algorithm_written_out_is_that_of_the_blocks() -> None:
    inputs = suite.inputs(GPTQ, torch.float32, CPU)
    weight, hessian = inputs["weight"].double(), inputs["hessian"].double()
    stale = gptq_quantize(weight, hessian, bits=4, group_size=128, block_size=128)
    torch.testing.assert_close(suite._written_out(weight, hessian), stale.dequantize())


@pytest.mark.parametrize("case", [LINEAR, GPTQ], ids=lambda case: case.kind)
@pytest.mark.parametrize("candidate", suite.SUITE.candidates, ids=lambda one: one.name)
def test_each_candidate_is_right_or_says_why_it_is_not_there(candidate, case: Case) -> None:
    dtype = torch.float32
    inputs = suite.inputs(case, dtype, CPU)
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    try:
        step = candidate.bind(case, inputs)
    except Unavailable:
        assert candidate.name == "float weights"
        return
    errors = accuracy.errors(suite.compared(step.run()), suite.truth(case, inputs))
    assert max(errors.values()) < (1e-6 if case.kind == "linear" else 1e-3)
    assert all(torch.equal(inputs[name], tensor) for name, tensor in before.items())


def test_work_and_traffic() -> None:
    assert suite.flops(LINEAR) == 2 * 3 * 32 * 256
    grids = 32 * 2 * 8
    assert suite.traffic(LINEAR, torch.bfloat16) == 32 * 128 + grids + 3 * (32 + 256) * 2
    assert suite.flops(GPTQ) > 24 * 256**2
    assert suite.traffic(GPTQ, torch.float32) == 4 * 24 * 256 + 4 * 256**2 + 24 * 128
