"""A model's layers become what the pure function makes of each, and nothing else changes."""

import copy
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tilework.quant import (
    AdaDimConfig,
    AWQConfig,
    GPTQConfig,
    LDLQConfig,
    QuantizationReport,
    QuantLinear,
    QuIPConfig,
    RTNConfig,
    SpQRConfig,
    VPTQConfig,
    adadim_quantize,
    awq_quantize,
    gptq_quantize,
    hessian_loss,
    load_quantized_,
    quantize_,
    rtn_quantize,
    save_quantized,
)

from quant.models.networks import ORDER, hessian, ids, inputs_of, network

CONFIG = GPTQConfig(bits=3, group_size=4)
OPTIONS: dict[str, Any] = {"bits": 3, "group_size": 4}


def quantize(
    model: nn.Module, config: Any = CONFIG, *args: Any, **options: Any
) -> QuantizationReport:
    return quantize_(model, config, *args, progress=False, **options)


def assert_codes(layer: Any, weight: Tensor, rows: Tensor) -> None:
    """Hold a layer to the function, with the Hessian of all its inputs at once."""
    expected = gptq_quantize(weight, hessian(rows).float(), **OPTIONS)
    torch.testing.assert_close(layer.weight, expected.dequantize())


def test_every_layer_is_what_the_function_makes_of_the_float_model() -> None:
    model, float_model = network(), network()
    report = quantize(model, CONFIG, ids(), sequential=False)
    assert list(report.quantized) == ORDER
    for name in ORDER:
        layer = model.get_submodule(name)
        assert type(layer) is QuantLinear
        before = float_model.get_submodule(name)
        assert_codes(layer, before.weight.detach(), inputs_of(float_model, name, ids()))


def test_later_layers_see_quantized_inputs() -> None:
    model, other = network(), network()
    report = quantize(model, CONFIG, ids())
    assert list(report.quantized) == ORDER
    for name in ORDER:
        before, layer = other.get_submodule(name), model.get_submodule(name)
        assert_codes(layer, before.weight.detach(), inputs_of(other, name, ids()))
        with torch.no_grad():
            before.weight.copy_(layer.weight)


@pytest.mark.parametrize("tokens", [5, 30, 1000])
def test_algorithms_that_need_rows_get_the_first_ones(tokens: int) -> None:
    for config, function in (
        (AWQConfig(**OPTIONS, max_tokens=tokens), partial(awq_quantize, max_tokens=tokens)),
        (AdaDimConfig(**OPTIONS, max_tokens=tokens), adadim_quantize),
    ):
        model, other = network(), network()
        report = quantize(model, config, ids())
        assert list(report.quantized) == ORDER
        for name in ORDER:
            before, layer = other.get_submodule(name), model.get_submodule(name)
            rows = inputs_of(other, name, ids())[:tokens]
            expected = function(before.weight.detach(), rows, **OPTIONS)
            assert torch.equal(layer.weight, expected.dequantize())
            H = hessian(rows)
            loss = hessian_loss(before.weight.detach(), layer.weight, H.float())
            assert report.quantized[name].loss == pytest.approx(loss.item(), rel=1e-4)
            with torch.no_grad():
                before.weight.copy_(layer.weight)


def test_no_more_batches_run_than_rows_are_needed() -> None:
    model, calls = network(), []
    model.embedding.register_forward_pre_hook(lambda *_: calls.append(1))
    quantize(model, AWQConfig(**OPTIONS, max_tokens=24), ids(5), sequential=False)
    assert len(calls) == 5  # the layer that is never called is waited for
    del model.unused
    calls.clear()
    model = network()
    del model.unused
    model.embedding.register_forward_pre_hook(lambda *_: calls.append(1))
    quantize(model, AWQConfig(**OPTIONS, max_tokens=24), ids(5), sequential=False)
    assert len(calls) == 1


def test_what_is_not_quantized_and_why() -> None:
    model, before = network(), network()
    report = quantize(model, CONFIG, ids(), filter_fn=lambda name, layer: name != "up")
    assert list(report.quantized) == [name for name in ORDER if name != "up"]
    assert report.skipped == {
        "head": "a weight that another module has too",
        "unused": "calibration never reached it",
        "up": "filter_fn",
    }
    for name in report.skipped:
        layer, old = model.get_submodule(name), before.get_submodule(name)
        assert type(layer) is nn.Linear
        assert torch.equal(layer.weight, old.weight)
    assert model.head.weight is model.embedding.weight


class Odd(nn.Linear):
    """Does something else."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).square()


def test_reasons_of_single_layers() -> None:
    own = nn.Linear(4, 4)
    own.forward = lambda input: input  # type: ignore[method-assign]
    whole = nn.Linear(4, 4)
    whole.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    model = nn.ModuleDict(
        {
            "odd": Odd(4, 4),
            "own": own,
            "whole": whole,
            "meta": nn.Linear(4, 4, device="meta"),
            "empty": nn.Linear(0, 4),
            "plain": nn.Linear(4, 4),
        }
    )
    report = quantize(model, RTNConfig())
    assert list(report.quantized) == ["plain"]
    assert report.skipped == {
        "odd": "Odd, a subclass of nn.Linear that may compute something else",
        "own": "a forward of its own",
        "whole": "a weight of int8",
        "meta": "a weight without values, on meta",
        "empty": "a weight without entries",
    }
    alone = nn.Linear(4, 4)
    assert quantize(alone, RTNConfig()).skipped == {"": "the model itself, which nothing holds"}


def test_rounding_to_nearest_needs_no_calibration() -> None:
    model, before = network(), network()
    report = quantize(model, RTNConfig(bits=3, group_size=4))
    assert list(report.quantized) == [
        "unused",
        "down",
        *("attention." + n for n in ("out", "query", "key", "value")),
        "up",
    ]
    for name, layer in report.quantized.items():
        expected = rtn_quantize(before.get_submodule(name).weight.detach(), **OPTIONS)
        assert torch.equal(model.get_submodule(name).weight, expected.dequantize())
        assert layer.loss is layer.rtn_loss is layer.relative_loss is None


def test_the_report() -> None:
    model, before = network(), network()
    report = quantize(model, CONFIG, ids(), sequential=False)
    for name, one in report.quantized.items():
        weight = before.get_submodule(name).weight.detach().double()
        H = hessian(inputs_of(before, name, ids()))
        layer = model.get_submodule(name)
        loss = hessian_loss(weight, layer.weight.double(), H).item()
        nearest = hessian_loss(weight, rtn_quantize(weight, **OPTIONS).dequantize(), H).item()
        assert one.loss == pytest.approx(loss, rel=1e-3)
        assert one.rtn_loss == pytest.approx(nearest, rel=1e-3)
        total = torch.einsum("oi,ij,oj->", weight, H, weight).item()
        assert one.relative_loss == pytest.approx(loss / total, rel=1e-3)
        assert (one.algorithm, one.bits, one.group_size) == ("GPTQ", 3, 4)
        assert one.weights == weight.numel()
        stored = sum(buffer.nbytes for buffer in layer.buffers())
        assert one.bits_per_weight == 8 * stored / weight.numel()
        assert one.seconds > 0


def test_modes_hooks_and_parameters_stay() -> None:
    model, calls = network(), []
    model.up.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    handle = model.up.register_forward_hook(lambda *_: calls.append("up"))
    bias, embedding = model.up.bias, model.embedding.weight
    quantize(model, CONFIG, ids())
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.up.bias is bias
    assert model.embedding.weight is embedding
    calls.clear()
    model(ids()[0])
    assert calls == ["up"]
    handle.remove()
    model(ids()[0])
    assert calls == ["up"]
    assert not model.down._forward_pre_hooks


def test_dropout_is_off_during_calibration() -> None:
    first, second = network(), network().eval()
    quantize(first, CONFIG, ids())
    quantize(second, CONFIG, ids())
    assert torch.equal(first.down.weight, second.down.weight)


@pytest.mark.parametrize(
    "form",
    [
        lambda batch: batch,
        lambda batch: (batch,),
        lambda batch: [batch],
        lambda batch: {"ids": batch},
        lambda batch: transformers.BatchEncoding({"ids": batch}),
    ],
)
def test_batches_are_passed_as_what_they_are(form: Callable[[Tensor], Any]) -> None:
    model, expected = network(), network()
    quantize(expected, CONFIG, ids())

    def once() -> Iterator[Any]:
        yield from map(form, ids())

    quantize(model, CONFIG, once())
    assert torch.equal(model.down.weight, expected.down.weight)


def test_a_layer_under_two_names_is_quantized_once_and_stays_shared() -> None:
    model = network()
    model.again = model.up
    report = quantize(model, CONFIG, ids())
    assert "up" in report.quantized
    assert "again" not in {**report.quantized, **report.skipped}
    assert model.again is model.up
    assert type(model.up) is QuantLinear


class Twice(nn.Module):
    """Calls its layers a number of times that the input says."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 24), nn.Linear(24, 24)
        self.calls = 0

    def forward(self, input: Tensor, times: int) -> Tensor:
        self.calls += 1
        for _ in range(times):
            input = self.second(torch.relu(self.first(input)))
        return input


@pytest.mark.parametrize("times", [(1, 1), (2, 2), (1, 3), (3, 1), (0, 2)])
def test_all_calls_count(times: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = Twice()
    batches = [(torch.randn(5, 24), n) for n in times]
    rows: list[Tensor] = []
    copied = copy.deepcopy(model)
    copied.first.register_forward_hook(lambda _, args, output: rows.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            copied(*batch)
    weight = model.first.weight.detach().clone()
    quantize(model, CONFIG, batches)
    assert_codes(model.first, weight, torch.cat(rows))


def test_layers_with_the_same_input_share_a_pass() -> None:
    model = network()
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    model.embedding.register_forward_pre_hook(count)
    quantize(model, CONFIG, ids(5))
    assert calls == 5 * (1 + len({"query, key, value", "out", "up", "down"}))


class Changed(nn.Module):
    """Two layers that get one tensor, which is another in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, input: Tensor) -> Tensor:
        input = input.clone()
        output = self.first(input)
        return output + self.second(input.abs_())


def test_a_tensor_that_changes_in_place_is_another() -> None:
    torch.manual_seed(0)
    model = Changed()
    weight = model.second.weight.detach().clone()
    batches = [torch.randn(9, 4)]
    quantize(model, CONFIG, batches)
    assert_codes(model.second, weight, batches[0].abs())


def test_the_same_call_has_the_same_result() -> None:
    states = []
    for _ in range(2):
        model = network()
        quantize(model, CONFIG, ids())
        states.append(model.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.untyped
@pytest.mark.parametrize(
    "config",
    [
        LDLQConfig(bits=3, group_size=4, greedy_passes=1),
        SpQRConfig(group_size=4, statistics_group_size=3),
        QuIPConfig(bits=3),
        VPTQConfig(vector_length=2, num_centroids=16, residual_centroids=4, normalize=True),
    ],
    ids=lambda config: config.algorithm,
)
def test_layers_of_every_form(config: Any, tmp_path: Any) -> None:
    model, other = network(), network()
    torch.manual_seed(3)
    report = quantize(model, config, ids(), checkpoint=tmp_path)
    assert list(report.quantized) == ORDER
    one = report.quantized["up"]
    if config.algorithm == "VPTQ":
        assert one.bits == (4 + 2) / 2
        assert one.rtn_loss is None
    else:
        assert one.bits == 3
        assert one.rtn_loss > 0
    again = quantize(other, config, ids(), checkpoint=tmp_path)
    assert again.quantized["up"] == one
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    save_quantized(model, tmp_path / "model")
    third = network()
    load_quantized_(third, tmp_path / "model")
    x = ids()[0]
    assert torch.equal(third.eval()(x), model.eval()(x))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("kind", ["llama", "qwen", "gpt2"])
def test_models_of_transformers(kind: str) -> None:
    sizes = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    small = {
        **sizes,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    torch.manual_seed(0)
    model: Any
    if kind == "gpt2":
        config: Any = transformers.GPT2Config(**sizes, n_embd=16, n_layer=2, n_head=2)
        model = transformers.GPT2LMHeadModel(config)
    elif kind == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small))
    else:
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**small))
    tokens = torch.randint(3, 40, (2, 9))
    before = model.eval()(tokens).logits
    report = quantize(model, GPTQConfig(bits=8, group_size=8), [{"input_ids": tokens}])
    assert len(report.quantized) == {"gpt2": 8, "llama": 15, "qwen": 15}[kind]
    assert not any(isinstance(module, Conv1D) for module in model.modules())
    after = model(tokens).logits
    assert (after - before).abs().max() < 0.02 * before.abs().max()
    output = model.generate(tokens[:, :3], max_new_tokens=4, do_sample=False)
    assert output.shape[1] <= 7


@pytest.mark.untyped
def test_a_compiled_model_is_calibrated_and_compiles_again() -> None:
    model, expected = network(), network()
    quantize(expected, CONFIG, ids())
    compiled = torch.compile(model, backend="eager")
    compiled.eval()(ids()[0])
    report = quantize(compiled, CONFIG, ids())
    assert list(report.quantized) == [f"_orig_mod.{name}" for name in ORDER]
    assert torch.equal(compiled(ids()[0]), expected.eval()(ids()[0]))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, torch.OutOfMemoryError])
def test_an_error_leaves_finished_layers_and_names_the_one(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, before, expected = network(), network(), network()
    quantize(expected, CONFIG, ids())
    modes = {name: module.training for name, module in model.named_modules()}
    quantizer = GPTQConfig.function

    def failing(weight: Tensor, *args: Any, **options: Any) -> Any:
        if weight.shape == (16, 8):
            raise error("no")
        return quantizer(weight, *args, **options)

    monkeypatch.setattr(GPTQConfig, "function", staticmethod(failing))
    with pytest.raises(error) as raised:
        quantize(model, CONFIG, ids())
    assert "layer up" in str(raised.value) + "".join(getattr(raised.value, "__notes__", ()))
    assert type(model.attention.out) is QuantLinear
    for name in ("up", "down"):
        assert type(model.get_submodule(name)) is nn.Linear
        assert torch.equal(model.get_submodule(name).weight, before.get_submodule(name).weight)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not any(module._forward_pre_hooks for module in model.modules())
    monkeypatch.undo()
    quantize(model, CONFIG, ids())
    assert torch.equal(model.down.weight, expected.down.weight)


def test_inputs_that_are_not_finite_name_the_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"^quantize_: layer 0: .*input must be finite"):
        quantize(model, CONFIG, [torch.full((2, 4), torch.inf)])
    assert type(model[0]) is nn.Linear


def test_work_goes_on_from_a_checkpoint(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = network()
    report = quantize(expected, CONFIG, ids())
    model = network()
    quantizer = GPTQConfig.function
    weights: list[Tensor] = []

    def counting(weight: Tensor, *args: Any, **options: Any) -> Any:
        if len(weights) == 4:
            raise KeyboardInterrupt
        weights.append(weight)
        return quantizer(weight, *args, **options)

    monkeypatch.setattr(GPTQConfig, "function", staticmethod(counting))
    monkeypatch.setattr(GPTQConfig, "check", lambda self: None)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, CONFIG, ids(), checkpoint=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    weights.clear()
    model = network()
    again = quantize(model, CONFIG, ids(), checkpoint=tmp_path)
    assert len(weights) == 2
    assert list(again.quantized) == list(report.quantized)
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert again.quantized["up"].loss == report.quantized["up"].loss
    with pytest.raises(ValueError, match=r"checkpoint must be of the same model and options"):
        quantize(network(), GPTQConfig(bits=4, group_size=4), ids(), checkpoint=tmp_path)
    other = network()
    with torch.no_grad():
        other.attention.query.weight.add_(1)
    with pytest.raises(ValueError, match=r"checkpoint must be of the same model and options"):
        quantize(other, CONFIG, ids(), checkpoint=tmp_path)


def test_progress_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    quantize_(network(), RTNConfig())
    assert re.search(r"quantize.*7/7", capsys.readouterr().err)
    quantize_(network(), RTNConfig(), progress=False)
    assert not capsys.readouterr().err


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((None, CONFIG), TypeError, "model must be a module"),
        ((nn.Identity(), "gptq"), TypeError, "config must be a configuration"),
        ((nn.Identity(), CONFIG), ValueError, "calibration must be an iterable of batches"),
        ((nn.Identity(), CONFIG, []), ValueError, "calibration must have at least one batch"),
        ((nn.Identity(), CONFIG, torch.ones(2, 2)), TypeError, "calibration must be an iterable"),
        ((nn.Identity(), CONFIG, [1.0]), TypeError, "calibration must be an iterable of batches"),
    ],
    ids=lambda value: "" if not isinstance(value, str) else value[:20],
)
def test_refusals(args: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^quantize_: {message}"):
        quantize(*args)


@pytest.mark.untyped
def test_options_are_refused_before_the_model_runs() -> None:
    def never(*_: Any) -> None:
        raise AssertionError

    model = network()
    model.register_forward_pre_hook(never)
    for config in (GPTQConfig(bits=9), GPTQConfig(scales="best"), LDLQConfig(rounding="up")):
        with pytest.raises(ValueError, match=r"must be"):
            quantize(model, config, ids())
    with pytest.raises(TypeError, match=r"^quantize_: filter_fn must be a function"):
        quantize(model, CONFIG, ids(), filter_fn=3)
