"""Properties that every loss keeps. The test file of a loss has its table."""

import inspect

import pytest
import torch

import tilework.losses

import samples
from helpers import FLOATING, HALF, assert_exact, dtype_name, of_numpy
from losses.samples import Arguments, Loss, class_index

# These have folders of tests of their own, linear forms of losses test_every_linear_form.py.
ELSEWHERE = {"linear_cross_entropy", "linear_kl_div"} | {
    name
    for name in tilework.losses.__all__
    if name.startswith("linear_") and name.removeprefix("linear_") in tilework.losses.__all__
}

every_loss = samples.every(Loss)
every_class_index_loss = samples.every(Loss, lambda sample: sample.class_index)


def test_every_loss_has_a_sample() -> None:
    names = set()
    for name in tilework.losses.__all__:
        function = getattr(tilework.losses, name)
        if inspect.isfunction(function):
            reduces = "reduction" in inspect.signature(function).parameters
            names |= {name} if reduces or name.endswith("_loss") else set()
    assert names - ELSEWHERE <= {sample.name for sample in samples.collect(Loss)}


@pytest.mark.untyped
@every_loss
def test_scalars_of_numpy_are_the_numbers_they_stand_for(sample: Loss) -> None:
    for options in sample.options:
        tensors, scalars = sample.draw(), of_numpy(options)
        expected = sample.function(**tensors, **options)
        assert torch.equal(sample.function(**tensors, **scalars), expected)
        if sample.module is not None:
            assert torch.equal(sample.call_module(tensors, scalars), expected)


def test_a_sample_says_that_its_loss_is_not_of_classes() -> None:
    with pytest.raises(ValueError, match=r"^norm_loss has no ignore_index: .* class_index=False$"):
        Loss(tilework.losses.norm_loss, torch.zeros_like, None)


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
@every_loss
def test_equals_its_definition(sample: Loss, dtype: torch.dtype) -> None:
    widened = sample.widens and dtype in HALF
    in_single = widened or dtype == torch.float64
    for options in (first | second for first in sample.options for second in sample.reductions):
        tensors = sample.draw(dtype)
        composed = sample.leaves(tensors, torch.float32 if in_single else dtype)
        exact = sample.leaves(tensors, torch.float64)
        results = (
            sample.function(**tensors, **options),
            sample.definition(**composed, **options),
            sample.definition(**exact, **options),
        )
        assert results[0].dtype == (torch.float32 if widened else dtype)
        assert_exact(*results, dtype)
        upstream = torch.rand_like(results[2]) + 0.5
        gradients = zip(
            *(
                sample.gradients(result, arguments, upstream)
                for result, arguments in zip(results, (tensors, composed, exact), strict=True)
            ),
            strict=True,
        )
        for actual, composition, truth in gradients:
            assert actual.dtype == dtype
            assert_exact(actual, composition, truth, dtype)


@pytest.mark.parametrize("dtype", HALF, ids=dtype_name)
@every_loss
def test_is_float32_under_autocast(sample: Loss, dtype: torch.dtype) -> None:
    tensors = sample.draw(dtype)
    with torch.autocast("cpu", dtype=dtype):
        half = sample.function(**tensors)
        single = sample.function(**sample.leaves(tensors, torch.float32))
    expected = sample.function(**sample.leaves(tensors, torch.float32))
    assert half.dtype == single.dtype == torch.float32
    torch.testing.assert_close(single, expected)
    torch.testing.assert_close(half, expected)


@every_loss
def test_leaves_its_arguments_alone(sample: Loss) -> None:
    tensors = sample.draw()
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    sample.gradients(sample.function(**tensors), tensors)
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor.detach(), before[name], rtol=0, atol=0, equal_nan=True)


@every_loss
def test_nan_shows(sample: Loss) -> None:
    for name in sample.differentiable:
        tensors = {key: tensor.detach() for key, tensor in sample.draw().items()}
        if "target" in tensors and not tensors["target"].is_floating_point():
            tensors["target"] = tensors["target"].clamp(min=0)
        tensors[name].view(-1)[0] = torch.nan
        assert sample.function(**tensors).isnan().any()


@every_loss
def test_of_nothing(sample: Loss) -> None:
    if not sample.batched:
        pytest.skip("takes no empty batch")
    tensors = sample.draw()
    none = {name: tensors[name][:0] for name in sample.batched if name in tensors}
    for options in sample.reductions:
        result = sample.function(**(tensors | none), **options)
        if options.get("reduction") == "none":
            assert result.shape[0] == 0
        else:
            mean = options.get("reduction", "mean") == "mean"
            expected = torch.tensor(sample.mean_of_nothing if mean else 0.0).to(result)
            torch.testing.assert_close(result, expected, equal_nan=True)


@every_loss
def test_any_strides(sample: Loss) -> None:
    tensors = sample.draw()
    strided: Arguments = {}
    for name, tensor in tensors.items():
        wide = torch.zeros(*tensor.shape, 3, dtype=tensor.dtype)
        wide[..., 1] = tensor.detach()
        strided[name] = wide[..., 1].requires_grad_(tensor.requires_grad)
    expected, actual = sample.function(**tensors), sample.function(**strided)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        sample.gradients(actual, strided), sample.gradients(expected, tensors)
    )


@pytest.mark.untyped
@every_loss
def test_derivatives(sample: Loss) -> None:
    # Some seconds for some: differences for every element, and for every pair of them.
    if sample.surrogate:
        pytest.skip("its gradient is not that of its value")
    for options in sample.options:
        tensors = sample.draw()

        def function(*leaves: torch.Tensor, tensors=tensors, options=options) -> torch.Tensor:
            named = dict(zip(sample.differentiable, leaves, strict=True))
            return sample.function(**(tensors | named), **options)

        leaves = [tensors[name] for name in sample.differentiable]
        assert torch.autograd.gradcheck(
            function, leaves, check_forward_ad=True, check_batched_grad=True
        )
        if sample.twice:
            assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.untyped
@every_loss
def test_vmap(sample: Loss) -> None:
    draws = [{name: tensor.detach() for name, tensor in sample.draw().items()} for _ in range(3)]
    stacked = {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}

    def gradient(tensors: Arguments) -> tuple[torch.Tensor, ...]:
        def function(*leaves: torch.Tensor) -> torch.Tensor:
            named = dict(zip(sample.differentiable, leaves, strict=True))
            return sample.function(**(tensors | named))

        leaves = tuple(tensors[name] for name in sample.differentiable)
        every = tuple(range(len(leaves)))
        return *torch.func.grad(function, argnums=every)(*leaves), function(*leaves)

    expected = [torch.stack(parts) for parts in zip(*map(gradient, draws), strict=True)]
    torch.testing.assert_close(list(torch.func.vmap(gradient)(stacked)), expected)


@pytest.mark.untyped
@every_loss
def test_compiles(sample: Loss) -> None:
    compiled = torch.compile(sample.function, fullgraph=True, dynamic=True, backend="aot_eager")
    for options in sample.options[:: max(1, len(sample.options) - 1)]:  # a graph for each
        tensors = sample.draw(torch.float32)
        expected, actual = sample.function(**tensors, **options), compiled(**tensors, **options)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            sample.gradients(actual, tensors), sample.gradients(expected, tensors)
        )
    if sample.class_index:
        # Values are not read there: a target that is no class shows in the loss.
        target = tensors["target"].clone()
        target[4] = tensors["input"].shape[1]
        loss = compiled(**(tensors | {"target": target}), **options)
        assert loss.requires_grad
        assert loss.isnan()


@every_loss
def test_module(sample: Loss) -> None:
    if sample.module is None:
        pytest.skip("has no module")
    for options in (first | second for first in sample.options for second in sample.reductions):
        tensors = sample.draw()
        expected = sample.function(**tensors, **options)
        assert torch.equal(sample.call_module(tensors, options), expected)
    owned = {name: tensors[name].detach() for name in sample.owned if name in tensors}
    module = sample.module(**owned, **options)
    assert set(module.state_dict()) == set(owned)
    assert all(f"{name}={value!r}" in repr(module) for name, value in sample.options[-1].items())
    defaults = inspect.signature(sample.module).parameters
    for name, parameter in inspect.signature(sample.function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            assert defaults[name].default == parameter.default
            by_position = defaults[name].kind is not parameter.KEYWORD_ONLY
            assert by_position == (name in sample.positional)
    with pytest.raises(TypeError, match="unexpected keyword"):
        sample.module(**owned, reductoin="mean")
    if sample.reductions != ({},):
        with pytest.raises(ValueError, match=f"{sample.name}: reduction must be one of 'mean'"):
            sample.module(**owned, reduction="average")


@pytest.mark.untyped
@every_loss
def test_bad_input(sample: Loss) -> None:
    tensors = sample.draw()
    with pytest.raises(TypeError, match="unexpected keyword"):
        sample.function(**tensors, reductoin="mean")
    with pytest.raises(TypeError, match="positional"):
        sample.function(*tensors.values(), *["mean"] * 4)
    if sample.reductions != ({},):
        with pytest.raises(ValueError, match=f"{sample.name}: reduction must be one of 'mean'"):
            sample.function(**tensors, reduction="average")
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            with pytest.raises(TypeError, match=f"{sample.name}: {name} must be "):
                sample.function(**(tensors | {name: tensor.detach().to(torch.int32)}))
        if name in sample.batched and len(sample.batched) > 1:
            with pytest.raises(ValueError, match=f"{sample.name}: .* must be .*shape"):
                sample.function(**(tensors | {name: tensor[1:]}))
        if len(tensors) > 1:
            with pytest.raises(ValueError, match=f"{sample.name}: .* must lie on the device of"):
                sample.function(**(tensors | {name: tensor.detach().to("meta")}))


@pytest.mark.untyped
@samples.every_refusal(Loss)
def test_refuses(sample: Loss, refusal: samples.Refusal) -> None:
    sample.check_refusal(refusal)


@every_class_index_loss
def test_layouts(sample: Loss) -> None:
    """(C) and (N, C, d1, d2) are (N, C) in another order."""
    tensors = sample.draw()
    input, target = class_index(3, 2, 5, classes=tensors["input"].shape[1]).values()
    flat = input.movedim(1, -1).flatten(0, -2)
    for options in sample.reductions:
        cubic = sample.function(**(tensors | {"input": input, "target": target}), **options)
        rows = sample.function(**(tensors | {"input": flat, "target": target.flatten()}), **options)
        torch.testing.assert_close(cubic.flatten(), rows.flatten())
        for row, label in zip(flat, target.flatten(), strict=True):
            single = {"input": row, "target": label}
            one = {"input": row[None], "target": label[None]}
            torch.testing.assert_close(
                sample.function(**(tensors | single), **options),
                sample.function(**(tensors | one), **options).squeeze(),
                equal_nan=True,
            )


@pytest.mark.parametrize("filling", [1e30, torch.inf, torch.nan])
@every_class_index_loss
def test_ignored_positions_do_not_count(sample: Loss, filling: float) -> None:
    tensors = sample.draw()
    ignored = torch.arange(len(tensors["target"])) % 3 == 1
    target = tensors["target"].clamp(min=0)
    for ignore_index in (-100, 3):
        marked = target.masked_fill(ignored, ignore_index)
        kept = marked != ignore_index
        input = tensors["input"].detach().clone()
        input[~kept] = filling
        few = {"input": tensors["input"].detach()[kept], "target": marked[kept]}
        for options in sample.reductions:
            options = options | {"ignore_index": ignore_index}
            leaf = tensors | {"input": input.requires_grad_(), "target": marked}
            result = sample.function(**leaf, **options)
            expected = sample.function(**(tensors | few), **options)
            if options["reduction"] == "none":
                assert not result[~kept].any()
                torch.testing.assert_close(result[kept], expected)
            else:
                torch.testing.assert_close(result, expected)
            (gradient,) = sample.gradients(result, {"input": leaf["input"]})
            assert not gradient[~kept].any()
            assert gradient[kept].any()


@every_class_index_loss
def test_everything_ignored(sample: Loss) -> None:
    tensors = sample.draw()
    tensors["target"] = torch.full_like(tensors["target"], -100)
    for options in sample.reductions:
        result = sample.function(**tensors, **options)
        if options["reduction"] == "mean":
            expected = torch.tensor(sample.mean_of_nothing).to(result)
            torch.testing.assert_close(result, expected, equal_nan=True)
        else:
            assert not result.any()
            assert not sample.gradients(result, tensors)[0].any()


@pytest.mark.untyped
@every_class_index_loss
def test_bad_targets(sample: Loss) -> None:
    tensors = sample.draw()
    target = tensors["target"].clamp(min=0)
    classes = tensors["input"].shape[1]
    with pytest.raises(TypeError, match=f"{sample.name}: target must be int64 of shape \\(13,\\)"):
        sample.function(**(tensors | {"target": target.int()}))
    accepted = r"target must be (int64 )?of shape \(13,\)"
    with pytest.raises(ValueError, match=f"{sample.name}: {accepted}"):
        sample.function(**(tensors | {"target": target[:, None]}))
    with pytest.raises(ValueError, match=f"{sample.name}: input must be of shape \\(C\\), "):
        sample.function(**(tensors | {"input": tensors["input"].sum()}))
    with pytest.raises(TypeError, match=f"{sample.name}: ignore_index must be an int"):
        sample.function(**tensors, ignore_index=1.0)
    for wrong in (classes, -1):
        target[4] = wrong
        with pytest.raises(IndexError, match=f"{sample.name}: target must lie in .*, got {wrong}"):
            sample.function(**(tensors | {"target": target}))
        # Where values cannot be read, such as under a transform, the loss is nan.
        unread = torch.func.vmap(
            lambda target: sample.function(**(tensors | {"target": target}), reduction="none")
        )(target[None])[0]
        assert unread[4].isnan()
        assert unread.isnan().sum() == 1


@every_class_index_loss
def test_extreme_logits(sample: Loss) -> None:
    """Values and gradients of finite logits are those of the definition, however large."""
    for dtype, size in ((torch.float32, 1e4), (torch.bfloat16, 1e4), (torch.float16, 100.0)):
        tensors = sample.draw(dtype)
        tensors["input"] = torch.where(tensors["input"] > 0, size, -size).to(dtype).requires_grad_()
        result = sample.function(**tensors, reduction="none")
        exact = sample.leaves(tensors, torch.float64)
        truth = sample.definition(**exact, reduction="none")
        composed = sample.leaves(tensors, dtype)
        composition = sample.definition(**composed, reduction="none")
        assert_exact(result, composition, truth.to(dtype).double(), dtype)
        gradients = (
            sample.gradients(value, arguments)[0]
            for value, arguments in (
                (result, tensors),
                (composition, composed),
                (truth, exact),
            )
        )
        assert_exact(*gradients, dtype)
