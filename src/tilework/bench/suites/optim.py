"""One step of optimizers, a kind of cases for each.

Sizes: ``T`` tensors of ``E`` elements, or the parameters of a GPT of ``L`` layers, ``D`` features
and ``V`` tokens. States are float32. The limit that counts is that of a copy: traffic is the
parameters and states read and written once, and the gradients read once.
"""

import inspect
import math
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from tilework import optim
from tilework.bench.suites import Candidate, Case, Inputs, Results, Step, Suite, Unavailable

LR, DECAY, EPS = 0.1, 0.1, 1e-8

First = Callable[[Tensor, Tensor], Tensor]


def _adam(p: Tensor, g: Tensor, eps: float = EPS) -> Tensor:
    return p * (1 - LR * DECAY) - LR * g / (g.abs() + eps)


def _adabelief(p: Tensor, g: Tensor) -> Tensor:
    beta1, beta2, eps = 0.9, 0.999, 1e-16
    belief = ((beta1 * g).square() + eps / (1 - beta2)).sqrt() + eps
    return p * (1 - LR * DECAY) - LR * g / belief


def _adafactor(p: Tensor, g: Tensor) -> Tensor:
    square = g * g + 1e-30
    if p.dim() >= 2:
        row, column = square.mean(-1, keepdim=True), square.mean(-2, keepdim=True)
        square = row * column / row.mean(-2, keepdim=True)
    change = g / square.sqrt()
    change = change / _rms(change).clamp(min=1.0)
    size = LR * _rms(p).clamp(min=1e-3)
    return p * (1 - DECAY * size) - size * change


def _fadam(p: Tensor, g: Tensor) -> Tensor:
    scale = g.abs() + (0.01 * _rms(g)).clamp(max=EPS)
    natural, decayed = (x / scale / _rms(x / scale).clamp(min=1.0) for x in (g, p))
    return p - LR * (0.1 * natural + DECAY * decayed)


def _lamb(p: Tensor, g: Tensor) -> Tensor:
    change = g / (g.abs() + 1e-6)
    if p.dim() < 2:
        return p - LR * change
    change = change + DECAY * p
    return p - LR * _length(p) / _length(change) * change


def _lars(p: Tensor, g: Tensor) -> Tensor:
    if p.dim() < 2:
        return p - LR * g
    ratio = 1e-3 * _length(p) / (_length(g) + DECAY * _length(p) + 1e-8)
    return p - LR * ratio * (g + DECAY * p)


def _projected(p: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, float]:
    """As AdamP and SGDP take whole matrices to be scale-invariant; all channels never are here."""
    size = _length(p)
    is_orthogonal = (g * p).sum().abs() / (_length(g) * size) < 0.1 / p.numel() ** 0.5
    if p.dim() < 2 or not is_orthogonal:
        return u, 1.0
    return u - p * (p * u).sum() / size.square(), 0.1


def _adamp(p: Tensor, g: Tensor) -> Tensor:
    u, factor = _projected(p, g, g / (g.abs() + EPS))
    return p * (1 - LR * DECAY * factor) - LR * u


def _sgdp(p: Tensor, g: Tensor) -> Tensor:
    u, factor = _projected(p, g, g)
    return p * (1 - LR * DECAY * factor / (1 - 0.9)) - LR * u


def _length(x: Tensor) -> Tensor:
    return x.square().sum().sqrt()


def _stable_spam(p: Tensor, g: Tensor) -> Tensor:
    return _adam(p, g / (_length(g) + EPS))


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


# What each optimizer makes of a parameter and a gradient in its first step, in closed form; and how
# many states it holds for each element.
KINDS: dict[str, tuple[str, First, int]] = {
    "adamw": ("AdamW", _adam, 2),
    "lion": ("Lion", lambda p, g: p * (1 - LR * DECAY) - LR * g.sign(), 1),
    "sgdw": ("SGDW", lambda p, g: p * (1 - LR * DECAY) - LR * g, 1),
    "adam_atan2": (
        "AdamATan2",
        lambda p, g: p * (1 - LR * DECAY) - LR * 1.27 * math.pi / 4 * g.sign(),
        2,
    ),
    "adabelief": ("AdaBelief", _adabelief, 2),
    "adafactor": ("Adafactor", _adafactor, 0),
    "stable_spam": ("StableSPAM", _stable_spam, 2),
    "fadam": ("FAdam", _fadam, 2),
    "lamb": ("LAMB", _lamb, 2),
    "lars": ("LARS", _lars, 1),
    "adamp": ("AdamP", _adamp, 2),
    "sgdp": ("SGDP", _sgdp, 1),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "sgdw": {"momentum": 0.9},
    "sgdp": {"momentum": 0.9},
    "adafactor": {"relative_step": False},
}
TORCH = {"adamw": "AdamW"}


def cases(device: str) -> list[Case]:
    """Large tensors, those of a GPT, and small ones."""
    dtypes = ("float32", "bfloat16")
    gpt = {"L": 12, "D": 768, "V": 50304}
    found = []
    for kind in KINDS:
        found += [
            Case(kind, {"T": 100, "E": 1_000_000}, dtypes),
            Case(kind, gpt, ("float32",)),
            Case(kind, {"T": 10_000, "E": 100}, ("float32",)),
            Case(kind, {"T": 20, "E": 100_000}, ("float32",), quick=True),
        ]
    return found


def shapes(case: Case) -> list[tuple[int, ...]]:
    """Of the parameters."""
    sizes = case.sizes
    if "T" in sizes:
        return [(sizes["E"],)] * sizes["T"]
    depth, width = sizes["L"], sizes["D"]
    block = [(width,), (3 * width, width), (width, width), (width,), (4 * width, width)]
    return [(sizes["V"], width), *[*block, (width, 4 * width)] * depth, (width,)]


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Parameters and their gradients."""
    generator = torch.Generator(device).manual_seed(0)
    return {
        f"{name} {index}": torch.randn(shape, device=device, generator=generator, dtype=dtype)
        for name in ("parameter", "gradient")
        for index, shape in enumerate(shapes(case))
    }


def truth(case: Case, inputs: Inputs) -> Results:
    """The first step in float64, in closed form."""
    _, first, _ = KINDS[case.kind]
    pairs = zip(*(_list(inputs, name) for name in ("parameter", "gradient")), strict=True)
    return {"parameters": torch.cat([first(p.double(), g.double()).reshape(-1) for p, g in pairs])}


def _list(inputs: Inputs, name: str) -> list[Tensor]:
    return [tensor for key, tensor in inputs.items() if key.startswith(name)]


def compared(results: Results) -> Results:
    """All parameters as one."""
    return {"parameters": torch.cat([tensor.reshape(-1) for tensor in results.values()])}


def elements(case: Case) -> int:
    """Of all parameters."""
    return sum(torch.Size(shape).numel() for shape in shapes(case))


def flops(case: Case) -> int:
    """About 12 for each element, and hardly any next to the traffic."""
    return 12 * elements(case)


def traffic(case: Case, dtype: torch.dtype) -> int:
    """Parameters and float32 states in and out, gradients in."""
    *_, states = KINDS[case.kind]
    return int(elements(case) * (3 * dtype.itemsize + 2 * 4 * states))


def _step(case: Case, inputs: Inputs, make: Callable[[list[nn.Parameter]], Any], name: str) -> Step:
    parameters = [nn.Parameter(tensor.clone()) for tensor in _list(inputs, "parameter")]
    for parameter, gradient in zip(parameters, _list(inputs, "gradient"), strict=True):
        parameter.grad = gradient.clone()  # some peers write into it
    optimizer = make(parameters)

    def run() -> Results:
        optimizer.step()
        return {str(index): parameter.detach() for index, parameter in enumerate(parameters)}

    return Step(run, name)


def _ours(**chosen: Any) -> Callable[[Case, Inputs], Step]:
    def build(case: Case, inputs: Inputs) -> Step:
        name, *_ = KINDS[case.kind]
        options = OPTIONS.get(case.kind, {}) | chosen
        kind = getattr(optim, name)

        def make(parameters: list[nn.Parameter]) -> Any:
            return kind(parameters, lr=LR, weight_decay=DECAY, **options)

        step = _step(case, inputs, make, f"tilework.optim.{name}")
        return Step(step.run, step.kernel, default=not chosen)

    return build


def _torch(**chosen: Any) -> Callable[[Case, Inputs], Step]:
    def build(case: Case, inputs: Inputs) -> Step:
        if case.kind not in TORCH:
            raise Unavailable(f"torch has no {case.kind}")
        kind = getattr(torch.optim, TORCH[case.kind])
        if next(iter(inputs.values())).dtype != torch.float32:
            raise Unavailable("its states have the dtype of the parameters")
        return _step(
            case,
            inputs,
            lambda parameters: kind(parameters, lr=LR, weight_decay=DECAY, **chosen),
            f"torch.optim.{TORCH[case.kind]} {chosen}",
        )

    return build


def _peer(module: str, names: dict[str, str], **chosen: Any) -> Callable[[Case, Inputs], Step]:
    def build(case: Case, inputs: Inputs) -> Step:
        if case.kind not in names:
            raise Unavailable(f"it is not measured for {case.kind}")
        kind = getattr(import_module(module), names[case.kind])
        parameters = inspect.signature(kind).parameters
        options = {"eps": EPS, "weight_decay": DECAY} | OPTIONS.get(case.kind, {}) | chosen
        known = {name: value for name, value in options.items() if name in parameters}
        return _step(
            case,
            inputs,
            lambda parameters: kind(parameters, lr=LR, **known),
            f"{module}.{names[case.kind]}",
        )

    return build


SUITE = Suite(
    module=__name__,
    about="One step of optimizers, many tensors at a time",
    cases=cases,
    inputs=inputs,
    candidates=(
        Candidate("tilework", _ours(), peer=False),
        Candidate("tilework (foreach)", _ours(foreach=True), peer=False),
        Candidate("tilework (compiled)", _ours(compiled=True), peer=False),
        Candidate(
            "tilework (stochastic)", _ours(rounding="stochastic"), peer=False, dtypes=("bfloat16",)
        ),
        Candidate(
            "tilework (stochastic, compiled)",
            _ours(rounding="stochastic", compiled=True),
            peer=False,
            dtypes=("bfloat16",),
        ),
        Candidate("tilework (Kahan)", _ours(rounding="kahan"), peer=False, dtypes=("bfloat16",)),
        Candidate(
            "tilework (Kahan, compiled)",
            _ours(rounding="kahan", compiled=True),
            peer=False,
            dtypes=("bfloat16",),
        ),
        Candidate("torch foreach", _torch(foreach=True)),
        Candidate("torch fused", _torch(fused=True)),
        Candidate(
            "pytorch-optimizer",
            _peer("pytorch_optimizer", {"lion": "Lion"}, weight_decouple=True),
            package="pytorch_optimizer",
            distribution="pytorch-optimizer",
        ),
        Candidate(
            "optimi",
            _peer("optimi", {"adamw": "AdamW", "lion": "Lion"}),
            package="optimi",
            distribution="torch-optimi",
        ),
        Candidate(
            "heavyball",
            _peer("heavyball", {"adamw": "AdamW"}),
            package="heavyball",
            distribution="heavyball",
        ),
        Candidate(
            "bitsandbytes",
            _peer("bitsandbytes.optim", {"adamw": "AdamW", "lion": "Lion"}),
            package="bitsandbytes",
            distribution="bitsandbytes",
            devices=("cuda",),
        ),
    ),
    composition="torch foreach",
    truth=truth,
    flops=flops,
    products=False,
    traffic=traffic,
    rank=4,
    compared=compared,
)
