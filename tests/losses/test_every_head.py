"""What every function of a linear head keeps where its tensors are spread over processes."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import tilework.losses
from tilework.losses import (
    LinearCrossEntropyLoss,
    VocabShard,
    linear_cross_entropy,
    linear_kl_div,
    linear_log_probs,
)

import processes
import samples
from losses import test_linear_log_probs
from losses.linear_cross_entropy import problem as cross_entropy
from losses.linear_forms import LinearForm
from losses.linear_kl_div import problem as divergence

CLASSES = 11
SPLIT = 6  # where the classes of one process end
TOKENS = 11  # of all processes under FSDP
FIRST = 7  # of the first one
INPUTS = ("input", "student_input", "teacher_input")
OF_TOKENS = (*INPUTS, "target", "mask", "token_weight")
LEAVES = ("input", "linear_weight", "linear_bias", "student_input", "student_weight")
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Head:
    """A function of a head, its definition by torch's own operations, and options of both."""

    function: Callable[..., Any]
    definition: Callable[..., Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def case(self) -> str:
        return f"{self.name} {self.options}"

    def takes(self, name: str) -> bool:
        return name in inspect.signature(self.function).parameters

    def draw(self, *positions: int) -> Tensors:
        """Its tensors, for positions of which the third one does not count."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64)

        hidden = torch.arange(torch.Size(positions).numel()).reshape(positions) == 2
        drawn = {
            "target": torch.randint(CLASSES, positions).masked_fill(hidden, -100),
            "mask": ~hidden,
            "token_weight": torch.rand(positions).double() + 0.1,
        }
        for name, width in (("", 4), ("student_", 4), ("teacher_", 3)):
            drawn[f"{name}input"] = normal(*positions, width)
            drawn[f"{name or 'linear_'}weight"] = normal(CLASSES, width)
            drawn[f"{name or 'linear_'}bias"] = normal(CLASSES)
        return {name: tensor for name, tensor in drawn.items() if self.takes(name)}

    def call(self, tensors: Tensors, function: Callable[..., Any], **options: Any) -> Tensor:
        """The losses of positions, for several results a sum of them, or what is reduced."""
        if self.takes("reduction"):
            options.setdefault("reduction", "none")
        found = function(**tensors, **self.options, **options)
        if isinstance(found, Tensor):
            return found
        return found.log_prob + 2 * found.lse + 3 * found.entropy  # type: ignore[no-any-return]

    def leaves(self, tensors: Tensors) -> list[Tensor]:
        return [tensors[name] for name in LEAVES if name in tensors]

    def heads(self) -> Iterator[tuple[str, str, str]]:
        """The names of input, weight and bias of each head."""
        for name in ("", "student_", "teacher_"):
            if self.takes(f"{name}input"):
                yield f"{name}input", f"{name or 'linear_'}weight", f"{name or 'linear_'}bias"


def table() -> list[Head]:
    heads = [
        Head(linear_cross_entropy, cross_entropy.composed, {"z_loss": 0.1}),
        Head(linear_log_probs, test_linear_log_probs.composed, {"temperature": 0.7}),
    ]
    for name in divergence.DIVERGENCES:
        heads.append(Head(linear_kl_div, divergence.composed, {"divergence": name}))
    for form in samples.collect(LinearForm):
        options = [one for one in form.options if "fraction" not in one]
        heads.append(Head(form.function, form.composed, options[-1]))
    return heads


def test_every_head_is_here() -> None:
    functions = (getattr(tilework.losses, name) for name in tilework.losses.__all__)
    spread = {
        function
        for function in functions
        if inspect.isfunction(function)
        and "vocab_parallel" in inspect.signature(function).parameters
    }
    assert spread == {head.function for head in table()}


def drawn(*positions: int) -> list[tuple[Head, Tensors]]:
    """Every function and its tensors, the same in every process."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(5)
        return [(head, head.draw(*positions)) for head in table()]


LAYOUTS: dict[str, tuple[tuple[int, ...], list[Any], list[Any], dict[str, int]]] = {
    "tokens": ((7,), [Shard(0)], [Replicate()], {}),
    "one token": ((1,), [Shard(0)], [Replicate()], {}),
    "positions": ((2, 7), [Shard(1)], [Replicate()], {}),
    "shifted sequences": ((3, 5), [Shard(0)], [Replicate()], {"shift": 1}),
    "classes": ((7,), [Replicate()], [Shard(0)], {}),
}


def everything() -> dict[str, Any]:
    """What the tests compare, from one start of the processes."""
    return {part.__name__: part() for part in (spread, far_below_zero, messages, under_fsdp)}


Results = dict[str, list[Any]]


@pytest.fixture(scope="module")
def ranks() -> Results:
    """By the part, what each process found."""
    found = processes.run(everything, 2)
    return {name: [results[name] for results in found] for name in found[0]}


def spread_cases() -> Iterator[tuple[str, Head, Tensors, list[Any], list[Any], dict[str, int]]]:
    for layout, (positions, of_tokens, of_classes, options) in LAYOUTS.items():
        for head, whole in drawn(*positions):
            if all(map(head.takes, options)):
                yield f"{head.case}, {layout}", head, whole, of_tokens, of_classes, options


def solve(
    head: Head, tensors: Tensors, function: Callable[..., Any], options: dict[str, int]
) -> list[Tensor]:
    """Losses, their mean, gradients of a function of them, and what is reduced."""
    leaves = [leaf.requires_grad_() for leaf in head.leaves(tensors)]
    losses = head.call(tensors, function, **options)
    grads = torch.autograd.grad(losses.sin().mean(), leaves)
    reductions = ("mean", "sum") if head.takes("reduction") else ()
    reduced = [head.call(tensors, function, reduction=name, **options) for name in reductions]
    return [losses, losses.mean(), *grads, *reduced]


def place(tensors: Tensors, mesh: DeviceMesh, of_tokens: Any, of_classes: Any) -> Tensors:
    return {
        name: distribute_tensor(tensor, mesh, of_tokens if name in OF_TOKENS else of_classes)
        for name, tensor in tensors.items()
    }


def assert_same(value: Tensor, truth: Tensor, name: str) -> None:
    torch.testing.assert_close(value, truth, rtol=1e-10, atol=1e-10, equal_nan=True, msg=name)


def gathered(value: Tensor) -> Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach()


def spread() -> dict[str, list[Tensor]]:
    mesh = init_device_mesh("cpu", (2,))
    results = {}
    for name, head, whole, of_tokens, of_classes, options in spread_cases():
        found = solve(head, place(whole, mesh, of_tokens, of_classes), head.function, options)
        losses, _, *grads = found[: 2 + len(head.leaves(whole))]
        # Replicated tokens, and what is reduced, give plain tensors.
        assert isinstance(losses, DTensor) == (of_tokens != [Replicate()]), name
        assert losses.is_contiguous()
        if isinstance(losses, DTensor):
            assert losses.to_local().is_contiguous(), name
        assert all(type(value) is Tensor for value in found[2 + len(grads) :]), name
        for grad, placed in zip(grads, (of_tokens, of_classes, of_classes), strict=False):
            assert list(grad.placements) == placed, name  # type: ignore[attr-defined]
        shapes = [torch.tensor(value.shape) for value in found]
        results[name] = shapes + [gathered(value) for value in found]
    return results


def test_tokens_and_classes_over_processes(ranks: Results) -> None:
    for results in ranks["spread"]:
        for name, head, whole, *_, options in spread_cases():
            expected = solve(head, whole, head.definition, options)
            shapes, values = results[name][: len(expected)], results[name][len(expected) :]
            for shape, value, truth in zip(shapes, values, expected, strict=True):
                assert shape.tolist() == list(truth.shape), name
                assert_same(value, truth.detach(), name)


def far_cases() -> Iterator[tuple[str, Head, Tensors]]:
    """Logits around -1000, also with one process's classes at minus infinity."""
    for impossible in (None, slice(0, SPLIT), slice(SPLIT, CLASSES)):
        for head, tensors in drawn(7):
            for _, _, bias in head.heads():
                tensors[bias] -= 1000
                if impossible is not None:
                    tensors[bias][impossible] = -torch.inf
            if impossible is not None and "target" in tensors:
                tensors["target"].fill_(CLASSES - 1 if impossible.start == 0 else 0)
            yield f"{head.case}, {impossible}", head, tensors


def far_below_zero() -> dict[str, list[Tensor]]:
    """The last process holds the first classes."""
    held = (slice(SPLIT, CLASSES), slice(0, SPLIT))[dist.get_rank()]
    shard = VocabShard(held.start, held.stop)
    results = {}
    for name, head, whole in far_cases():
        tensors = {
            name: one.clone() if name in OF_TOKENS else one[held].clone()
            for name, one in whole.items()
        }
        # The divergence has no whole logits to be defined by.
        for implementation in ("tiled", *(["reference"] if "target" in whole else [])):
            leaves = [leaf.requires_grad_() for leaf in head.leaves(tensors)]
            losses = head.call(
                tensors, head.function, vocab_parallel=shard, implementation=implementation
            )
            grads = torch.autograd.grad(losses.sum(), leaves)
            results[f"{name}, {implementation}"] = [losses.detach(), *grads]
    return results


def test_classes_far_below_zero(ranks: Results) -> None:
    finite = 0
    for name, head, whole in far_cases():
        leaves = [leaf.requires_grad_() for leaf in head.leaves(whole)]
        losses = head.call(whole, head.definition)
        if not losses.isfinite().all():  # of squares of logits
            continue
        finite += 1
        input, *of_classes = torch.autograd.grad(losses.sum(), leaves)
        for rank, found in enumerate(ranks["far_below_zero"]):
            held = (slice(SPLIT, CLASSES), slice(0, SPLIT))[rank]
            expected = [losses.detach(), input, *(one[held] for one in of_classes)]
            for case in [case for case in found if case.startswith(f"{name}, ")]:
                for value, truth in zip(found[case], expected, strict=True):
                    assert_same(value, truth, case)
    assert finite >= 3 * len(table()) - 2


def refusals(
    head: Head, whole: Tensors, mesh: DeviceMesh
) -> Iterator[tuple[str, Tensors, list[Tensors]]]:
    """The start of a message, tensors that are taken, and changes of each that are not."""
    by_class = place(whole, mesh, [Replicate()], [Shard(0)])
    by_token = place(whole, mesh, [Shard(0)], [Replicate()])
    other = DeviceMesh("cpu", [1, 0])

    def placed(name: str, *placements: Any, mesh: DeviceMesh = mesh) -> Tensors:
        return {name: DTensor.from_local(whole[name], mesh, placements, run_check=False)}

    def plain(name: str) -> Tensors:
        return {name: whole[name]}

    for input, weight, bias in head.heads():
        mixed = f"TypeError {head.name}: {input} must be a DTensor beside {weight}"
        yield mixed, by_class, [plain(input)]
        yield mixed, by_token, [plain(input)]
        start = f"ValueError {head.name}: {weight} must be sharded on dimension 0"
        yield start, by_class, [placed(weight, Partial()), placed(weight, Shard(1))]
        start = f"TypeError {head.name}: {weight} must be a DTensor beside others"
        yield start, by_class, [plain(weight)]
        start = f"ValueError {head.name}: {bias} must be a DTensor placed as {weight}"
        elsewhere = {bias: distribute_tensor(whole[bias], other, [Shard(0)])}
        changes = [placed(bias, Replicate()), placed(bias, Partial()), elsewhere]
        yield start, by_class, [plain(bias), *changes]
        start = f"ValueError {head.name}: {input} must be replicated, or sharded over tokens"
        changes = [placed(input, one) for one in (Shard(0), Shard(1), Partial())]
        yield start, by_class, [*changes, placed(input, Replicate(), mesh=other)]
    first = next(name for name in INPUTS if name in whole)
    for name in ("target", "mask", "token_weight"):
        if name in whole:
            start = f"ValueError {head.name}: {name} must be placed as {first}"
            changes = [placed(name, Shard(0)), placed(name, Replicate(), mesh=other)]
            yield start, by_class, changes
            start = f"TypeError {head.name}: {name} must be a DTensor placed as {first}"
            yield start, by_token, [plain(name)]
    if head.takes("weight"):
        weight_of_classes = distribute_tensor(torch.ones(CLASSES), mesh, [Replicate()])
        start = f"TypeError {head.name}: weight must be a plain tensor"
        yield start, by_class, [{"weight": weight_of_classes}]


def messages() -> list[tuple[str, str]]:
    """What each refusal must begin with, and what came."""
    mesh = init_device_mesh("cpu", (2,))
    shard = VocabShard(*((0, SPLIT), (SPLIT, CLASSES))[dist.get_rank()])
    found = []

    def message(head: Head, tensors: Tensors, **options: Any) -> str:
        try:
            head.call(tensors, head.function, **options)
        except (ValueError, TypeError, RuntimeError) as error:
            return f"{type(error).__name__} {error}"
        return "no error"

    for head, whole in drawn(7):
        for start, tensors, changes in refusals(head, whole, mesh):
            found.append(("no error", message(head, tensors)))
            found += [(start, message(head, tensors | change)) for change in changes]
        start = f"ValueError {head.name}: vocab_parallel must be None for DTensors"
        tensors = place(whole, mesh, [Replicate()], [Shard(0)])
        found.append((start, message(head, tensors, vocab_parallel=shard)))
    return found


def test_refused_placements(ranks: Results) -> None:
    for found in ranks["messages"]:
        assert len(found) > 100
        for start, message in found:
            assert message.startswith(start), f"{message}\n{start}"


class Model(nn.Module):
    """A body, and a function of a head whose weight is that of the embedding."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.head = head
        self.embedding = nn.Embedding(CLASSES, 4)
        self.body = nn.Linear(4, 4)
        self.double()

    def forward(
        self, tokens: Tensor, tensors: Tensors, function: Callable[..., Any], unshard: bool = False
    ) -> Tensor:
        (input, weight, _), *_ = self.head.heads()
        hidden = self.body(self.embedding(tokens)).tanh()
        if unshard:
            self.embedding.unshard()  # type: ignore[operator]
        own = {input: hidden, weight: self.embedding.weight}
        return self.head.call(tensors | own, function).sum()


class WithCriterion(nn.Module):
    """The same with the module that owns its head, whose classes a mesh may have."""

    def __init__(self, tied: bool, mesh: DeviceMesh | None = None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.mesh = mesh
        self.embedding = nn.Embedding(CLASSES, 4)
        self.body = nn.Linear(4, 4)
        self.criterion = LinearCrossEntropyLoss(4, CLASSES, reduction="sum")
        if tied:
            self.criterion.linear.weight = self.embedding.weight  # type: ignore[assignment]
        self.double()

    def hidden(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.body(self.embedding(tokens)).tanh()
        return hidden if self.mesh is None else DTensor.from_local(hidden, self.mesh, [Replicate()])

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        return self.criterion(self.hidden(tokens), target)  # type: ignore[no-any-return]


class Composed(WithCriterion):
    """Its definition."""

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        logits = self.criterion.linear(self.hidden(tokens))
        return nn.functional.cross_entropy(logits, target, reduction="sum")


def trained(model: nn.Module, share: float, *arguments: Any) -> list[Tensor]:
    """A share of the model's loss, and the gradients of the second of two steps."""
    for _ in range(2):
        model.zero_grad()
        loss = model(*arguments) * share
        loss.backward()
    return [loss.detach(), *(gathered(one.grad) for one in model.parameters())]  # type: ignore[arg-type]


def text() -> tuple[Tensor, Tensor]:
    """Tokens and targets."""
    target = torch.arange(TOKENS) * 3 % CLASSES
    target[2] = -100
    return torch.arange(TOKENS) * 7 % CLASSES, target


def under_fsdp() -> dict[str, Any]:
    """Every process has some of the tokens; the mean over all of them is wanted."""
    mesh = init_device_mesh("cpu", (2,))
    mine = (slice(FIRST), slice(FIRST, None))[dist.get_rank()]
    share = dist.get_world_size() / TOKENS  # as gradients are averaged over processes
    tokens, target = (one[mine] for one in text())
    results: dict[str, Any] = {}
    for head, whole in drawn(TOKENS):
        tensors = {name: one[mine] if name in OF_TOKENS else one for name, one in whole.items()}
        for units in ("root", "unsharded", "own"):
            model = Model(head)
            for part in (model.body, *([] if units == "root" else [model.embedding]), model):
                fully_shard(part, mesh=mesh)
            arguments = tokens, tensors, head.function
            if units == "own":
                with pytest.raises(TypeError, match="under FSDP2") as error:
                    model(*arguments)
                results[f"{head.case}, {units}"] = str(error.value)
            else:
                found = trained(model, share, *arguments, units == "unsharded")
                results[f"{head.case}, {units}"] = found
    for tied in (False, True):
        owner = WithCriterion(tied)
        together = [owner.embedding, owner.criterion] if tied else owner.criterion
        for part in (owner.body, together, owner):
            fully_shard(part, mesh=mesh)  # type: ignore[call-overload]
        results[f"criterion, tied={tied}"] = trained(owner, share, tokens, target)
    both = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "model"))
    owner = WithCriterion(False, both["model"])
    parallelize_module(owner.criterion.linear, both["model"], ColwiseParallel())
    for part in (owner.body, owner):
        fully_shard(part, mesh=both["data"])
    results["tensor parallel"] = trained(owner, 1 / TOKENS, *text())
    return results


def test_under_fsdp(ranks: Results) -> None:
    expected: dict[str, list[Tensor]] = {}
    tokens, target = text()
    for head, whole in drawn(TOKENS):
        solved = trained(Model(head), 1 / TOKENS, tokens, whole, head.definition)
        expected |= {f"{head.case}, root": solved, f"{head.case}, unsharded": solved}
    for tied in (False, True):
        expected[f"criterion, tied={tied}"] = trained(Composed(tied), 1 / TOKENS, tokens, target)
    expected["tensor parallel"] = expected["criterion, tied=False"]
    found = ranks["under_fsdp"]
    for name, (loss, *grads) in expected.items():
        assert_same(sum(results[name][0] for results in found) / len(found), loss, name)
        for results in found:
            for value, truth in zip(results[name][1:], grads, strict=True):
                assert_same(value, truth, name)
    for head in table():
        (input, weight, _), *_ = head.heads()
        start = f"{head.name}: {input} must be a DTensor beside {weight}"
        assert all(results[f"{head.case}, own"].startswith(start) for results in found)
