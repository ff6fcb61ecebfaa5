"""Cross-entropy of a linear head, forward and backward, against everything else that computes it.

Sizes: ``N`` tokens, ``D`` features, ``V`` classes. Logits have a standard deviation of 1 and
targets are uniform, as at the start of training, where no gradient is negligible. Peaked logits
fall by 2 for each e-fold of a class's rank, so that few classes count, as in a trained model.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tilework.bench.suites import (
    Candidate,
    Case,
    Growth,
    Inputs,
    Results,
    Step,
    Suite,
    Unavailable,
    implementations,
    loss_and_gradients,
)
from tilework.losses import linear_cross_entropy
from tilework.losses._classes.kept import noted
from tilework.losses._classes.linear.common import product_operations

FORWARD, TRAINING, PEAKED = "forward", "forward+backward", "forward+backward, peaked"
FILTER = 1e-3
HALF = ("bfloat16", "float16")
TRUTH_ROWS = 256

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def cases(device: str) -> list[Case]:
    """Heads of two language models, a series of fewer classes, and a small one for --quick."""
    head, small = {"N": 2048, "D": 768, "V": 50304}, {"N": 256, "D": 192, "V": 4096}
    large = {"N": 1024, "D": 2304, "V": 256000}
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    series = [2**11, 2**13, 2**15]
    if device != "cpu":
        head, small = {"N": 8192, "D": 4096, "V": 128256}, {"N": 1024, "D": 1024, "V": 16384}
        large = {"N": 8192, "D": 2304, "V": 256000}
        dtypes, series = ("bfloat16",), [2**13, 2**15]
    return [
        *(Case(kind, head, dtypes) for kind in (TRAINING, FORWARD)),
        *(Case(TRAINING, head | {"V": classes}, dtypes) for classes in series),
        Case(PEAKED, head, dtypes),
        Case(TRAINING, large, dtypes),
        Case(TRAINING, small, dtypes, quick=True),
    ]


def growth() -> tuple[Growth, ...]:
    """Tokens, then classes."""
    sizes = {"N": 512, "D": 128, "V": 4096}
    return tuple(
        Growth(over, tuple(Case(TRAINING, sizes | {over: size}, ("float32",)) for size in powers))
        for over, powers in (
            ("N", [2**power for power in range(7, 15)]),
            ("V", [2**power for power in range(10, 18)]),
        )
    )


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Hidden states, a head's weight, and targets."""
    tokens, features, classes = case.sizes.values()
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int, scale: float) -> Tensor:
        values = torch.randn(rows, features, device=device, generator=generator) * scale
        return values.to(dtype).requires_grad_(case.kind != FORWARD)

    input, weight = normal(tokens, 1.0), normal(classes, features**-0.5)
    if case.kind == PEAKED:
        rank = torch.arange(1, classes + 1, device=device)
        with torch.no_grad():
            input[:, 0] = 1
            weight[:, 0] = -2 * rank.log()
    return {
        "input": input,
        "weight": weight,
        "target": torch.randint(classes, (tokens,), device=device, generator=generator),
    }


def truth(case: Case, inputs: Inputs) -> Results:
    """The closed form in float64, a few rows at a time; no autograd."""
    weight = inputs["weight"].detach().double()
    total = weight.new_zeros(())
    grad_input: list[Tensor] = []
    grad_weight = torch.zeros_like(weight)
    for start in range(0, case.sizes["N"], TRUTH_ROWS):
        rows = slice(start, start + TRUTH_ROWS)
        hidden, target = inputs["input"].detach()[rows].double(), inputs["target"][rows]
        logits = hidden @ weight.T
        log_sum = logits.logsumexp(1, keepdim=True)
        row = torch.arange(len(target), device=target.device)
        total += (log_sum[:, 0] - logits[row, target]).sum()
        if case.kind != FORWARD:
            grad = logits.sub_(log_sum).exp_()
            grad[row, target] -= 1
            grad_input.append(grad @ weight)
            grad_weight.addmm_(grad.T, hidden)
    tokens = case.sizes["N"]
    results = {"loss": total / tokens}
    if case.kind != FORWARD:
        results |= {
            "grad input": torch.cat(grad_input) / tokens,
            "grad weight": grad_weight / tokens,
        }
    return results


def flops(case: Case) -> int:
    """One matrix product forward, two backward."""
    return (1 if case.kind == FORWARD else 3) * product_operations(*case.sizes.values())


def traffic(case: Case, dtype: torch.dtype) -> int:
    """Read the hidden states, the weight and the targets; write the two gradients."""
    tokens, features, classes = case.sizes.values()
    matrices = (tokens + classes) * features * dtype.itemsize
    return (2 if case.kind != FORWARD else 1) * matrices + 8 * tokens


def _step(loss: Loss, inputs: Inputs, kernel: str) -> Step:
    input, weight, target = (inputs[name] for name in ("input", "weight", "target"))
    return Step(loss_and_gradients(lambda: loss(input, weight, target), inputs), kernel)


def _plain(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(input, weight), target)


def _upcast(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(input, weight).float(), target)


def _ours(case: Case, inputs: Inputs, implementation: str) -> Callable[[], Results]:
    if implementation == "chunked" and case.kind == FORWARD:
        raise Unavailable("chunks are for gradients; the loss alone is computed as by the others")

    def loss(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return linear_cross_entropy(input, weight, target, implementation=implementation)

    return _step(loss, inputs, "").run


def _filtered(implementation: str) -> Callable[[Case, Inputs], Step]:
    """With a gradient filter, and the part of the gradient's classes or tiles that it keeps."""

    def build(case: Case, inputs: Inputs) -> Step:
        if case.kind == FORWARD:
            raise Unavailable("the filter is for gradients")

        def loss(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
            return linear_cross_entropy(
                input, weight, target, gradient_filter=FILTER, implementation=implementation
            )

        run = _step(loss, inputs, "").run
        with noted() as shares:
            run()
        kept, total = (sum(column) for column in zip(*shares, strict=True))
        kernel = f"tilework.losses._classes.linear.{implementation}, gradient_filter={FILTER}"
        return Step(run, kernel, facts={"kept": kept / total})

    return build


def _given(case: Case, inputs: Inputs) -> dict[str, Any]:
    return {"linear_weight": inputs["weight"], "is_sum": True}


def _torch_eager(case: Case, inputs: Inputs) -> Step:
    return _step(_plain, inputs, "F.cross_entropy(F.linear)")


def _torch_upcast(case: Case, inputs: Inputs) -> Step:
    return _step(_upcast, inputs, "F.cross_entropy(F.linear.float())")


def _torch_compile(case: Case, inputs: Inputs) -> Step:
    compiled = torch.compile(_upcast, dynamic=False)
    return _step(compiled, inputs, "inductor of F.cross_entropy(F.linear.float())")


def _torch_fused(chunked: bool) -> Callable[[Case, Inputs], Step]:
    def build(case: Case, inputs: Inputs) -> Step:
        function = getattr(F, "linear_cross_entropy", None)
        if function is None:
            raise Unavailable(f"torch {torch.__version__} has no F.linear_cross_entropy")
        options = torch.nn.LinearCrossEntropyOptions() if chunked else None

        def loss(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
            value: Tensor = function(input, weight, target, options=options)
            return value

        return _step(
            loss, inputs, f"F.linear_cross_entropy {'chunked' if chunked else 'reference'}"
        )

    return build


def _cut_cross_entropy(implementation: str) -> Callable[[Case, Inputs], Step]:
    def build(case: Case, inputs: Inputs) -> Step:
        import cut_cross_entropy

        def loss(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
            value: Tensor = cut_cross_entropy.linear_cross_entropy(
                input, weight, target, impl=implementation
            )
            return value

        return _step(loss, inputs, f"cut_cross_entropy impl={implementation}")

    return build


def _liger(case: Case, inputs: Inputs) -> Step:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    function = LigerFusedLinearCrossEntropyLoss()
    return _step(
        lambda input, weight, target: function(weight, input, target),
        inputs,
        "LigerFusedLinearCrossEntropyLoss",
    )


def _quack(case: Case, inputs: Inputs) -> Step:
    function: Loss = import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return _step(function, inputs, "quack chunked_linear_cross_entropy")


def _fla(case: Case, inputs: Inputs) -> Step:
    function = import_module("fla.modules").FusedLinearCrossEntropyLoss()
    return _step(
        lambda input, weight, target: function(input, target, weight),
        inputs,
        "fla FusedLinearCrossEntropyLoss",
    )


def _cce(name: str, implementation: str, devices: tuple[str, ...] = ()) -> Candidate:
    return Candidate(
        name,
        _cut_cross_entropy(implementation),
        package="cut_cross_entropy",
        distribution="cut-cross-entropy",
        devices=devices,
    )


SUITE = Suite(
    module=__name__,
    about="cross-entropy of a linear head without the logits in memory",
    cases=cases,
    inputs=inputs,
    candidates=(
        *implementations("losses.linear_cross_entropy", _ours, _given),
        *(
            Candidate(
                f"tilework {implementation} (filter)",
                _filtered(implementation),
                peer=False,
                devices=(device,),
                dtypes=HALF,
            )
            for implementation, device in (("tiled", "cpu"), ("triton", "cuda"))
        ),
        Candidate("torch eager", _torch_eager),
        Candidate("torch eager (float32 logits)", _torch_upcast, dtypes=HALF),
        Candidate("torch compile", _torch_compile),
        Candidate("torch fused", _torch_fused(chunked=False)),
        Candidate("torch fused (chunked)", _torch_fused(chunked=True)),
        _cce("cut-cross-entropy", "cce", devices=("cuda",)),
        _cce("cut-cross-entropy (compiled)", "torch_compile"),
        Candidate(
            "liger-kernel",
            _liger,
            package="liger_kernel",
            distribution="liger-kernel",
            devices=("cuda",),
        ),
        Candidate(
            "quack", _quack, package="quack", distribution="quack-kernels", devices=("cuda",)
        ),
        Candidate(
            "flash-linear-attention",
            _fla,
            package="fla",
            distribution="flash-linear-attention",
            devices=("cuda",),
        ),
    ),
    composition="torch eager",
    truth=truth,
    flops=flops,
    products=True,
    traffic=traffic,
    rank=0,
    growth=growth(),
)
