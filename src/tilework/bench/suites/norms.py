"""RMS and layer normalization, forward, backward and with a fused residual sum.

Sizes: ``M`` rows, ``N`` features. ``layer`` cases have a bias, all have a weight. The limit that
counts is that of a copy: traffic is the inputs once and the results once.
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
)
from tilework.norms import layer_norm, rms_norm

EPS = 1e-5
ROWS = 32768
WIDTHS = (1024, 4096, 16384, 32768, 65536, 262144)
TRUTH_ROWS = 1024

Norm = Callable[..., Any]  # of input, residual, weight, bias and whether the mean is subtracted


def cases(device: str) -> list[Case]:
    """Every width, forward and backward; rows fewer on the CPU."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16") if device == "cpu" else ("bfloat16",)
    rows, widths = (8192, (1024, 4096)) if device == "cpu" else (ROWS, WIDTHS)
    kinds = [f"{norm} {what}" for norm in ("rms", "layer") for what in _WHATS]
    full = [Case(kind, {"M": rows, "N": width}, dtypes) for width in widths for kind in kinds]
    heads = Case("rms forward", {"M": 32 * rows, "N": 128}, dtypes)
    small = [Case(f"{norm} backward", {"M": 256, "N": 1024}, dtypes, quick=True) for norm in _NORMS]
    return [*full, heads, *small]


def growth() -> tuple[Growth, ...]:
    """Rows and features, from 2 MB to 268 MB in float32."""
    kinds = ("rms forward", "rms backward", "layer backward")
    powers = [2**power for power in range(11, 19)]
    return tuple(
        Growth(
            over,
            tuple(Case(kind, {"M": 256, "N": 256} | {over: size}, ("float32",)) for size in powers),
        )
        for kind in kinds
        for over in ("M", "N")
    )


_NORMS = ("rms", "layer")
_WHATS = ("forward", "backward", "residual forward", "residual backward")


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Rows, their residual and parameters, and the gradients that come in."""
    rows, width = case.sizes.values()
    generator = torch.Generator(device).manual_seed(0)
    backward, residual = "backward" in case.kind, "residual" in case.kind

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator, dtype=dtype)

    tensors = {"input": normal(rows, width), "weight": normal(width)}
    if "layer" in case.kind:
        tensors["bias"] = normal(width)
    if residual:
        tensors["residual"] = normal(rows, width)
    tensors = {name: tensor.requires_grad_(backward) for name, tensor in tensors.items()}
    if backward:
        names = ("grad output", "grad sum") if residual else ("grad output",)
        tensors |= {name: normal(rows, width) for name in names}
    return tensors


def truth(case: Case, inputs: Inputs) -> Results:
    """The closed form in float64, some rows at a time; no autograd."""
    tensors = {name: tensor.detach() for name, tensor in inputs.items()}
    centered = "layer" in case.kind
    weight = tensors["weight"].double()
    parts: dict[str, list[Tensor]] = {}
    sums = {name: torch.zeros_like(weight) for name in ("weight", "bias") if name in tensors}
    for start in range(0, case.sizes["M"], TRUTH_ROWS):
        some = {
            name: tensor[start : start + TRUTH_ROWS].double()
            for name, tensor in tensors.items()
            if tensor.dim() == 2
        }
        total = some["input"] + some.get("residual", 0.0)
        mean = total.mean(1, keepdim=True) if centered else 0.0
        rstd = ((total - mean).square().mean(1, keepdim=True) + EPS).rsqrt()
        normal = (total - mean) * rstd
        found = {}
        if "grad output" in some:
            grad = some["grad output"]
            scaled = grad * weight
            c2 = scaled.mean(1, keepdim=True) if centered else 0.0
            c1 = (scaled * normal).mean(1, keepdim=True)
            found["grad input"] = rstd * (scaled - c2 - normal * c1) + some.get("grad sum", 0)
            sums["weight"] += (grad * normal).sum(0)
            if centered:
                sums["bias"] += grad.sum(0)
        else:
            found["output"] = normal * weight
            if centered:
                found["output"] += tensors["bias"].double()
            if "residual" in some:
                found["sum"] = total
        for name, part in found.items():
            parts.setdefault(name, []).append(part)
    results = {name: torch.cat(some) for name, some in parts.items()}
    if "backward" in case.kind:
        results |= {f"grad {name}": value for name, value in sums.items()}
    return results


def flops(case: Case) -> int:
    """Of the definition: about 4 for each element forward, 10 backward."""
    rows, width = case.sizes.values()
    return (10 if "backward" in case.kind else 4) * rows * width


def traffic(case: Case, dtype: torch.dtype) -> int:
    """Tensors of rows that are read and written once: statistics and parameters hardly count."""
    rows, width = case.sizes.values()
    tensors = 4 if "residual" in case.kind else 3 if "backward" in case.kind else 2
    return tensors * rows * width * dtype.itemsize


def _step(norm: Norm, case: Case, inputs: Inputs, kernel: str) -> Step:
    """Forward, or the backward alone of a graph that is kept."""
    centered = "layer" in case.kind
    names = ("input", "residual", "weight", "bias")
    tensors = [inputs.get(name) for name in names]
    if "backward" not in case.kind:

        def forward() -> Results:
            with torch.no_grad():
                outputs = norm(*tensors, centered)
            named = outputs if isinstance(outputs, tuple) else (outputs,)
            return dict(zip(("output", "sum"), named, strict=False))

        return Step(forward, kernel)
    outputs = norm(*tensors, centered)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leaves = {name: inputs[name] for name in ("input", "weight", "bias") if name in inputs}
    upstream = [inputs[name] for name in ("grad output", "grad sum") if name in inputs]

    def backward() -> Results:
        grads = torch.autograd.grad(outputs, list(leaves.values()), upstream, retain_graph=True)
        return {f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}

    return Step(backward, kernel)


def _torch(
    input: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, centered: bool
) -> Any:
    total = input if residual is None else input + residual
    size = total.shape[1:]
    if centered:
        output = F.layer_norm(total, size, weight, bias, EPS)
    else:
        output = F.rms_norm(total, size, weight, EPS)
    return output if residual is None else (output, total)


def _ours(case: Case, inputs: Inputs, implementation: str) -> Callable[[], Results]:
    def norm(
        input: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, centered: bool
    ) -> Any:
        size = input.shape[1]
        options: dict[str, Any] = {"residual": residual, "implementation": implementation}
        if centered:
            return layer_norm(input, size, weight, bias, EPS, **options)
        return rms_norm(input, size, weight, EPS, **options)

    return _step(norm, case, inputs, "").run


def _given(case: Case, inputs: Inputs) -> dict[str, Any]:
    tensors = {name: inputs.get(name) for name in ("residual", "weight", "bias")}
    return {**tensors, "centered": "layer" in case.kind}


def _eager(case: Case, inputs: Inputs) -> Step:
    name = "layer_norm" if "layer" in case.kind else "rms_norm"
    return _step(_torch, case, inputs, f"F.{name}{' of a sum' * ('residual' in case.kind)}")


def _compiled(case: Case, inputs: Inputs) -> Step:
    return _step(torch.compile(_torch, dynamic=False), case, inputs, "inductor of torch eager")


def _only(case: Case, rms: bool, residual: bool) -> None:
    if "layer" in case.kind and not rms:
        raise Unavailable("it is not measured for layer normalization")
    if "residual" in case.kind and not residual:
        raise Unavailable("it is not measured with a residual")


def _liger(case: Case, inputs: Inputs) -> Step:
    ops = import_module("liger_kernel.ops")
    _only(case, rms="layer" in case.kind and "residual" not in case.kind, residual=True)

    def norm(
        input: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, centered: bool
    ) -> Any:
        if centered:
            return ops.LigerLayerNormFunction.apply(input, weight, bias, EPS)
        if residual is None:
            return ops.LigerRMSNormFunction.apply(input, weight, EPS, 0.0, "gemma", False)
        return ops.LigerFusedAddRMSNormFunction.apply(
            input, residual, weight, EPS, 0.0, "gemma", False
        )

    return _step(norm, case, inputs, "liger_kernel")


def _quack(case: Case, inputs: Inputs) -> Step:
    function = import_module("quack.rmsnorm").rmsnorm
    _only(case, rms=False, residual=True)

    def norm(
        input: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, centered: bool
    ) -> Any:
        return function(input, weight, residual=residual, eps=EPS, prenorm=residual is not None)

    return _step(norm, case, inputs, "quack.rmsnorm")


def _flash(module: str, name: str) -> Callable[[Case, Inputs], Step]:
    """flash-attn's layer norm, which flash-linear-attention took over."""

    def build(case: Case, inputs: Inputs) -> Step:
        function = getattr(import_module(module), name)

        def norm(
            input: Tensor,
            residual: Tensor | None,
            weight: Tensor,
            bias: Tensor | None,
            centered: bool,
        ) -> Any:
            return function(
                input,
                weight,
                bias,
                residual=residual,
                eps=EPS,
                prenorm=residual is not None,
                is_rms_norm=not centered,
            )

        return _step(norm, case, inputs, f"{module}.{name}")

    return build


def _peer(name: str, build: Callable[[Case, Inputs], Step], package: str) -> Candidate:
    return Candidate(name, build, package=package, distribution=name, devices=("cuda",))


SUITE = Suite(
    module=__name__,
    about="RMS and layer normalization, with and without a residual",
    cases=cases,
    inputs=inputs,
    candidates=(
        *implementations("norms.rms_norm", _ours, _given),
        Candidate("torch eager", _eager),
        Candidate("torch compile", _compiled),
        _peer("liger-kernel", _liger, "liger_kernel"),
        _peer("quack-kernels", _quack, "quack"),
        _peer(
            "flash-attn", _flash("flash_attn.ops.triton.layer_norm", "layer_norm_fn"), "flash_attn"
        ),
        _peer("flash-linear-attention", _flash("fla.modules.layernorm", "layer_norm"), "fla"),
    ),
    composition="torch eager",
    truth=truth,
    flops=flops,
    products=False,
    traffic=traffic,
    rank=2,
    growth=growth(),
)
