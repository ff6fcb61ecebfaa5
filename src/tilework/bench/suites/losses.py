"""Losses over classes, labels, bins, quantiles and experts, forward and backward.

The kinds are the functions' names. Sizes: ``N`` rows, and ``C`` columns, which are the classes,
labels, bins, quantile levels or experts. Logits over classes favor the target, as those of a
trained model do.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from tilework import losses
from tilework.bench.suites import (
    Candidate,
    Case,
    Growth,
    Inputs,
    Results,
    Step,
    Suite,
    Unavailable,
    loss_and_gradients,
)

CROSS_ENTROPY, SQUENTROPY = "cross_entropy_with_z_loss", "squentropy"
PLAIN = "cross_entropy"  # the first one without smoothing and penalty, which more peers have
COMP_SUM, Z, FOCAL = "comp_sum_loss", "z_loss", "multilabel_focal_loss"
ERROR_NORM, NUMBERS = "error_norm_truncation_loss", "number_token_cross_entropy"
HL_GAUSS, PINBALL, BALANCE = "hl_gauss_loss", "pinball_loss", "load_balancing_loss"
HALF = ("bfloat16", "float16")
SMOOTHING, Z_LOSS = 0.1, 1e-4
TAU = 1.7  # the generalized cross-entropy with q = 0.7
GAMMA = 2.0
THRESHOLD = 1.3  # of error norms: a few positions in a hundred exceed it
DIGITS = 100  # tokens that stand for a number
NUMBER_WEIGHT = 0.3
RANGE = 10.0  # of the bins' values, in both directions
CHOSEN = 8  # experts of a token
COLUMNS = ("levels", "costs", "values")  # what there is of columns alone, not of rows
TRUTH_ELEMENTS = 2**24

Loss = Callable[..., Tensor]
"""Of a case's inputs, in their order."""


def cases(device: str) -> list[Case]:
    """A language model's head, the gate of a mixture of experts and others; a small one."""
    sizes = {
        CROSS_ENTROPY: (1024, 32768),
        BALANCE: (65536, 128),
        SQUENTROPY: (1024, 32768),
        FOCAL: (2**17, 80),
        HL_GAUSS: (65536, 101),
        COMP_SUM: (1024, 32768),
        PINBALL: (2**20, 9),
        PLAIN: (1024, 32768),
        Z: (1024, 32768),
        ERROR_NORM: (1024, 32768),
        NUMBERS: (1024, 32768),
    }
    of_classes = (PLAIN, CROSS_ENTROPY, SQUENTROPY, COMP_SUM, Z, ERROR_NORM, NUMBERS)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    if device != "cpu":
        sizes |= dict.fromkeys(of_classes, (4096, 128256))
        sizes |= {BALANCE: (2**19, 128), FOCAL: (2**20, 80), HL_GAUSS: (2**19, 101)}
        sizes |= {PINBALL: (2**23, 9)}
        dtypes = ("bfloat16",)
    return [
        *(Case(kind, {"N": rows, "C": width}, dtypes) for kind, (rows, width) in sizes.items()),
        Case(SQUENTROPY, {"N": 256, "C": 4096}, ("float32",), quick=True),
    ]


def growth() -> tuple[Growth, ...]:
    """Rows and classes of a language model's head, then tokens of a gate."""
    return tuple(
        Growth(over, tuple(Case(kind, sizes | {over: 2**power}, ("float32",)) for power in powers))
        for kind, sizes, over, powers in (
            (CROSS_ENTROPY, {"N": 0, "C": 4096}, "N", range(5, 13)),
            (CROSS_ENTROPY, {"N": 256, "C": 0}, "C", range(9, 17)),
            (BALANCE, {"N": 0, "C": 64}, "N", range(11, 19)),
        )
    )


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Logits, or what else the loss is of, and targets."""
    rows, width = case.sizes.values()
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, device=device, generator=generator)

    input, others = normal(rows, width), {}
    if case.kind == FOCAL:
        others = {"target": (uniform(rows, width) < 0.1).to(dtype)}
    elif case.kind == HL_GAUSS:
        others = {"target": RANGE * (2 * uniform(rows) - 1)}
    elif case.kind == PINBALL:
        target = normal(rows).to(dtype)
        levels = torch.arange(1, width + 1, device=device) / (width + 1)
        # No gradient is defined where they are equal.
        input = input.where(input.to(dtype) != target[:, None], input + 1)
        others = {"target": target, "levels": levels}
    elif case.kind == BALANCE:
        input += normal(width)
        # Rounding must not decide which experts are chosen.
        input.scatter_add_(1, input.topk(CHOSEN).indices, input.new_full((rows, CHOSEN), 0.5))
    else:
        target = torch.randint(width, (rows,), device=device, generator=generator)
        input.mul_(2)[torch.arange(rows, device=device), target] += math.log(width)
        others = {"target": target}
    if case.kind == Z:
        del others["target"]
    elif case.kind == NUMBERS:
        values = torch.full((width,), math.nan, device=device)
        digits = min(DIGITS, width // 2)
        values[:digits] = torch.arange(digits, device=device).float()
        others["target"] = others["target"].where(uniform(rows) < 0.5, others["target"] % digits)
        others["values"] = values
    return {"input": input.to(dtype).requires_grad_(), **others}


def truth(case: Case, inputs: Inputs) -> Results:
    """The closed form in float64, some rows at a time; no autograd."""
    rows, width = case.sizes.values()
    tensors = {name: tensor.detach() for name, tensor in inputs.items()}
    if case.kind == BALANCE:
        chosen = tensors["input"].topk(CHOSEN).indices.flatten()
        tensors["costs"] = chosen.bincount(minlength=width).double() * width / rows
    elif case.kind == NUMBERS:
        counts = tensors["target"] < int(tensors["values"].isfinite().sum())
        tensors["share"] = counts.double() * rows / counts.sum()
    step = max(1, TRUTH_ELEMENTS // width)
    total = torch.zeros((), dtype=torch.float64, device=inputs["input"].device)
    grads = []
    for start in range(0, rows, step):
        some = [
            tensor if name in COLUMNS else tensor[start : start + step]
            for name, tensor in tensors.items()
        ]
        values, slopes = FORMULAS[case.kind].truth(
            *(tensor.double() if tensor.is_floating_point() else tensor for tensor in some)
        )
        total += values.sum()
        grads.append(slopes / rows)
    return {"loss": total / rows, "grad input": torch.cat(grads)}


def flops(case: Case) -> int:
    """Of the definition, about."""
    rows, width = case.sizes.values()
    return FORMULAS[case.kind].flops * rows * width


def traffic(case: Case, dtype: torch.dtype) -> int:
    """Read the input and the targets, write the gradient."""
    rows, width = case.sizes.values()
    targets = {
        FOCAL: dtype.itemsize * width,
        HL_GAUSS: 4,
        PINBALL: dtype.itemsize,
        BALANCE: 0,
        Z: 0,
    }
    return rows * (2 * width * dtype.itemsize + targets.get(case.kind, 8))


@dataclass(frozen=True)
class _Formula:
    """A loss three times: Tilework's, as it is written with torch, and in closed form.

    ``truth`` takes rows of the inputs, and returns the loss of each and its gradient.
    """

    ours: Loss
    composition: Loss
    truth: Callable[..., tuple[Tensor, Tensor]]
    flops: int  # for each element


def _at(target: Tensor) -> tuple[Tensor, Tensor]:
    """Where the targets' entries are."""
    return torch.arange(len(target), device=target.device), target


def _ours_cross_entropy(input: Tensor, target: Tensor) -> Tensor:
    return losses.cross_entropy_with_z_loss(input, target, label_smoothing=SMOOTHING, z_loss=Z_LOSS)


def _cross_entropy(input: Tensor, target: Tensor) -> Tensor:
    loss = F.cross_entropy(input, target, label_smoothing=SMOOTHING)
    return loss + Z_LOSS * input.logsumexp(1).square().mean()


def _true_cross_entropy(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    log_sum = input.logsumexp(1, keepdim=True)
    wanted = torch.full_like(input, SMOOTHING / input.shape[1])
    wanted[_at(target)] += 1 - SMOOTHING
    values = log_sum - (wanted * input).sum(1, keepdim=True) + Z_LOSS * log_sum.square()
    return values, (input - log_sum).exp() * (1 + 2 * Z_LOSS * log_sum) - wanted


def _squentropy(input: Tensor, target: Tensor) -> Tensor:
    squares = input.scatter(1, target[:, None], 0).square().sum(1)
    return F.cross_entropy(input, target) + squares.mean() / (input.shape[1] - 1)


def _true_squentropy(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    log_sum, others = input.logsumexp(1), input.shape[1] - 1
    wrong = input.index_put(_at(target), input.new_zeros(()))
    grad = (input - log_sum[:, None]).exp() + 2 * wrong / others
    grad[_at(target)] -= 1
    return log_sum - input[_at(target)] + wrong.square().sum(1) / others, grad


def _ours_comp_sum(input: Tensor, target: Tensor) -> Tensor:
    return losses.comp_sum_loss(input, target, tau=TAU)


def _comp_sum(input: Tensor, target: Tensor) -> Tensor:
    probability = input.softmax(1).gather(1, target[:, None])
    return ((1 - probability ** (TAU - 1)) / (TAU - 1)).mean()


def _true_comp_sum(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    grad = input.softmax(1)
    power = grad[_at(target)] ** (TAU - 1)
    grad[_at(target)] -= 1
    return (1 - power) / (TAU - 1), power[:, None] * grad


def _ours_plain(input: Tensor, target: Tensor) -> Tensor:
    return losses.cross_entropy_with_z_loss(input, target, z_loss=0.0)


def _true_plain(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    log_probs = input.log_softmax(1)
    grad = log_probs.exp()
    grad[_at(target)] -= 1
    return -log_probs[_at(target)], grad


def _ours_z(input: Tensor) -> Tensor:
    return losses.z_loss(input, coefficient=1.0)


def _z(input: Tensor) -> Tensor:
    return input.logsumexp(1).square().mean()


def _true_z(input: Tensor) -> tuple[Tensor, Tensor]:
    log_sum = input.logsumexp(1)
    return log_sum.square(), 2 * log_sum[:, None] * input.softmax(1)


def _ours_error_norm(input: Tensor, target: Tensor) -> Tensor:
    return losses.error_norm_truncation_loss(input, target, threshold=THRESHOLD)


def _error_norm(input: Tensor, target: Tensor) -> Tensor:
    with torch.no_grad():
        gaps = input.softmax(1) - F.one_hot(target, input.shape[1]).to(input.dtype)
        survives = torch.linalg.vector_norm(gaps, dim=1) <= THRESHOLD
    total = (F.cross_entropy(input, target, reduction="none") * survives).sum()
    mean: Tensor = total / len(target)
    return mean


def _true_error_norm(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    values, grad = _true_plain(input, target)
    survives = (grad.square().sum(1) <= THRESHOLD**2).double()
    return survives * values, survives[:, None] * grad


def _ours_numbers(input: Tensor, target: Tensor, values: Tensor) -> Tensor:
    return losses.number_token_cross_entropy(input, target, values, ntl_weight=NUMBER_WEIGHT)


def _numbers(input: Tensor, target: Tensor, values: Tensor) -> Tensor:
    """As it is released, but with a mask in place of a selection of rows."""
    digits = int(values.isfinite().sum())
    counts = target < digits
    gaps = (values[:digits] - values[target.where(counts, 0)][:, None]).abs().to(input.dtype)
    distance = (input[:, :digits].softmax(1) * gaps).sum(1)
    mean = (distance * counts).sum() / counts.sum()
    return F.cross_entropy(input, target) + NUMBER_WEIGHT * mean


def _true_numbers(
    input: Tensor, target: Tensor, values: Tensor, share: Tensor
) -> tuple[Tensor, Tensor]:
    """With the share of each row's distance in the mean of those that have one."""
    likelihood, grad = _true_plain(input, target)
    digits = int(values.isfinite().sum())
    gaps = (values[:digits] - values[target.clamp(max=digits - 1)][:, None]).abs()
    probabilities = input[:, :digits].softmax(1)
    distance = (probabilities * gaps).sum(1, keepdim=True)
    grad[:, :digits] += NUMBER_WEIGHT * share[:, None] * probabilities * (gaps - distance)
    return likelihood + NUMBER_WEIGHT * share * distance[:, 0], grad


def _ours_focal(input: Tensor, target: Tensor) -> Tensor:
    return losses.multilabel_focal_loss(input, target, gamma=GAMMA)


def _focal(input: Tensor, target: Tensor) -> Tensor:
    """As in torchvision."""
    probability = input.sigmoid()
    right = probability * target + (1 - probability) * (1 - target)
    entropy = F.binary_cross_entropy_with_logits(input, target, reduction="none")
    return (entropy * (1 - right) ** GAMMA).mean()


def _true_focal(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    sign = 2 * target - 1
    missed, entropy = (-sign * input).sigmoid(), F.softplus(-sign * input)
    slope = -(missed**GAMMA) * (GAMMA * (1 - missed) * entropy + missed)
    return (missed**GAMMA * entropy).mean(1), sign * slope / input.shape[1]


def _ours_hl_gauss(input: Tensor, target: Tensor) -> Tensor:
    return losses.hl_gauss_loss(input, target, min_value=-RANGE, max_value=RANGE)


def _hl_gauss(input: Tensor, target: Tensor) -> Tensor:
    bins, (dtype, device) = input.shape[1], (target.dtype, target.device)
    edges = torch.linspace(-RANGE, RANGE, bins + 1, dtype=dtype, device=device)
    sigma = 0.75 * 2 * RANGE / bins
    below = torch.erf((edges - target[:, None]) / (math.sqrt(2) * sigma))
    wanted = below.diff(dim=1) / (below[:, -1:] - below[:, :1])
    return F.cross_entropy(input, wanted.to(input.dtype))


def _true_hl_gauss(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    bins = input.shape[1]
    edges = torch.arange(-bins, bins + 1, 2, device=input.device).double() * RANGE / bins
    below = torch.special.ndtr((edges - target[:, None]) / (1.5 * RANGE / bins))
    wanted = below.diff(dim=1) / (below[:, -1:] - below[:, :1])
    values = input.logsumexp(1) - (wanted * input).sum(1)
    return values, input.softmax(1) - wanted


def _pinball(input: Tensor, target: Tensor, levels: Tensor) -> Tensor:
    above = target[:, None] - input
    return torch.maximum(levels * above, (levels - 1) * above).mean()


def _true_pinball(input: Tensor, target: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    grad = (input > target[:, None]).double() - levels
    return (grad * (input - target[:, None])).mean(1), grad / input.shape[1]


def _ours_balance(input: Tensor) -> Tensor:
    probabilities = input.softmax(1)
    chosen = probabilities.topk(CHOSEN).indices
    return losses.load_balancing_loss(probabilities, chosen, normalize=False)


def _balance(input: Tensor) -> Tensor:
    """As in Switch and Mixtral."""
    probabilities = input.softmax(1)
    chosen = F.one_hot(probabilities.topk(CHOSEN).indices, input.shape[1])
    return input.shape[1] * (chosen.float().mean(0).sum(0) * probabilities.mean(0)).sum()


def _true_balance(input: Tensor, costs: Tensor) -> tuple[Tensor, Tensor]:
    """With how often each expert is chosen, times how many experts there are, as its cost."""
    probabilities = input.softmax(1)
    values = probabilities @ costs
    return values, probabilities * (costs - values[:, None])


FORMULAS = {
    CROSS_ENTROPY: _Formula(_ours_cross_entropy, _cross_entropy, _true_cross_entropy, flops=12),
    SQUENTROPY: _Formula(losses.squentropy, _squentropy, _true_squentropy, flops=12),
    PLAIN: _Formula(_ours_plain, F.cross_entropy, _true_plain, flops=8),
    Z: _Formula(_ours_z, _z, _true_z, flops=8),
    ERROR_NORM: _Formula(_ours_error_norm, _error_norm, _true_error_norm, flops=16),
    NUMBERS: _Formula(_ours_numbers, _numbers, _true_numbers, flops=10),
    COMP_SUM: _Formula(_ours_comp_sum, _comp_sum, _true_comp_sum, flops=8),
    FOCAL: _Formula(_ours_focal, _focal, _true_focal, flops=20),
    HL_GAUSS: _Formula(_ours_hl_gauss, _hl_gauss, _true_hl_gauss, flops=16),
    PINBALL: _Formula(losses.pinball_loss, _pinball, _true_pinball, flops=5),
    BALANCE: _Formula(_ours_balance, _balance, _true_balance, flops=10),
}


def _step(loss: Loss, inputs: Inputs, kernel: str, default: bool = False) -> Step:
    return Step(loss_and_gradients(lambda: loss(*inputs.values()), inputs), kernel, default)


def _upcast(case: Case) -> Loss:
    loss = FORMULAS[case.kind].composition

    def upcast(*tensors: Tensor) -> Tensor:
        return loss(*(one.float() if one.is_floating_point() else one for one in tensors))

    return upcast


def _ours(case: Case, inputs: Inputs) -> Step:
    return _step(FORMULAS[case.kind].ours, inputs, f"tilework losses.{_name(case)}", default=True)


def _name(case: Case) -> str:
    return CROSS_ENTROPY if case.kind == PLAIN else case.kind


def _compiled(case: Case, loss: Loss) -> Loss:
    if case.quick:
        raise Unavailable("it is left out of --quick, as it takes long to compile")
    compiled: Loss = torch.compile(loss, dynamic=False)
    return compiled


def _ours_compiled(case: Case, inputs: Inputs) -> Step:
    compiled = _compiled(case, FORMULAS[case.kind].ours)
    return _step(compiled, inputs, f"inductor of tilework losses.{_name(case)}")


def _torch_eager(case: Case, inputs: Inputs) -> Step:
    return _step(FORMULAS[case.kind].composition, inputs, "torch's operators")


def _torch_upcast(case: Case, inputs: Inputs) -> Step:
    return _step(_upcast(case), inputs, "torch's operators in float32")


def _torch_compile(case: Case, inputs: Inputs) -> Step:
    compiled = _compiled(case, _upcast(case))
    return _step(compiled, inputs, "inductor of torch's operators in float32")


def _liger(case: Case, inputs: Inputs) -> Step:
    options = {
        CROSS_ENTROPY: {"label_smoothing": SMOOTHING, "lse_square_scale": Z_LOSS},
        PLAIN: {},
    }
    if case.kind not in options:
        raise Unavailable(f"it has no {case.kind}")
    module = import_module("liger_kernel.transformers")
    function = module.LigerCrossEntropyLoss(**options[case.kind])

    def loss(input: Tensor, target: Tensor) -> Tensor:
        value: Tensor = function(input.clone(), target)  # it overwrites its input
        return value

    return _step(loss, inputs, "a copy, LigerCrossEntropyLoss")


def _quack(case: Case, inputs: Inputs) -> Step:
    if case.kind != PLAIN:
        raise Unavailable(f"it has no {case.kind}")
    function = import_module("quack.cross_entropy").cross_entropy

    def loss(input: Tensor, target: Tensor) -> Tensor:
        value: Tensor = function(input, target, reduction="mean")
        return value

    return _step(loss, inputs, "quack.cross_entropy")


def _transformers(case: Case, inputs: Inputs) -> Step:
    if case.kind != BALANCE:
        raise Unavailable(f"it has no {case.kind}")
    module = import_module("transformers.models.mixtral.modeling_mixtral")

    def loss(input: Tensor) -> Tensor:
        value: Tensor = module.load_balancing_loss_func((input,), input.shape[1], CHOSEN)
        return value

    return _step(loss, inputs, "load_balancing_loss_func")


def _pytorch_optimizer(case: Case, inputs: Inputs) -> Step:
    if case.kind != FOCAL:
        raise Unavailable(f"it has no {case.kind}")
    function = import_module("pytorch_optimizer").BCEFocalLoss(alpha=0.5, gamma=GAMMA)

    def loss(input: Tensor, target: Tensor) -> Tensor:
        value: Tensor = 2 * function(input.sigmoid(), target)  # it halves both classes
        return value

    return _step(loss, inputs, "BCEFocalLoss of sigmoid")


SUITE = Suite(
    module=__name__,
    about="losses over classes, labels, bins, quantiles and experts",
    cases=cases,
    inputs=inputs,
    candidates=(
        Candidate("tilework", _ours, peer=False),
        Candidate("tilework (compiled)", _ours_compiled, peer=False),
        Candidate("torch eager", _torch_eager),
        Candidate("torch eager (float32)", _torch_upcast, dtypes=HALF),
        Candidate("torch compile", _torch_compile),
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
            "transformers", _transformers, package="transformers", distribution="transformers"
        ),
        Candidate(
            "pytorch-optimizer",
            _pytorch_optimizer,
            package="pytorch_optimizer",
            distribution="pytorch-optimizer",
        ),
    ),
    composition="torch eager",
    truth=truth,
    flops=flops,
    products=False,
    traffic=traffic,
    growth=growth(),
)
