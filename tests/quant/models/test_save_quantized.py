"""What is written comes back bit for bit, and a file that does not fit changes nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from tilework.quant import (
    GPTQConfig,
    QuantizedTensor,
    QuantLinear,
    RTNConfig,
    load_quantized_,
    quantize_,
    save_quantized,
)

from quant.models.networks import Network, ids, network


def quantized(**options: Any) -> Network:
    model = network()
    config = GPTQConfig(bits=3, group_size=4, act_order=True)
    quantize_(model, config, ids(), progress=False, **options)
    return model


def assert_same(actual: nn.Module, expected: nn.Module) -> None:
    left, right = actual.state_dict(), expected.state_dict()
    assert left.keys() == right.keys()
    for key, value in right.items():
        assert left[key].dtype == value.dtype
        assert torch.equal(left[key], value), key


def fresh(seed: int = 7) -> Network:
    torch.manual_seed(seed)
    return Network()


def test_a_model_comes_back(tmp_path: Path) -> None:
    model, other = quantized(), fresh()
    save_quantized(model, tmp_path / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    embedding, bias = other.embedding.weight, other.unused.bias
    load_quantized_(other, str(tmp_path / "model.safetensors"))
    assert_same(other, model)
    assert other.embedding.weight is embedding
    assert other.head.weight is embedding
    assert other.unused.bias is bias
    assert isinstance(other.attention.key, QuantLinear)
    assert other.attention.key.quantized.group_index is not None
    assert other.up.bias is not None
    assert other.up.bias.requires_grad
    assert torch.equal(other.eval()(ids()[0]), model.eval()(ids()[0]))
    again = quantized()
    with torch.no_grad():
        again.embedding.weight.zero_()
    load_quantized_(again, tmp_path / "model.safetensors")
    assert_same(again, model)


def test_a_model_on_meta_gets_its_values(tmp_path: Path) -> None:
    model = quantized().eval()
    save_quantized(model, tmp_path / "file")
    with torch.device("meta"):
        other = Network().eval()
    load_quantized_(other, tmp_path / "file")
    assert_same(other, model)
    assert other.head.weight is other.embedding.weight
    assert torch.equal(other(ids()[0]), model(ids()[0]))


def test_a_model_of_transformers(tmp_path: Path) -> None:
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    tokens = torch.randint(0, 40, (2, 9))
    quantize_(model, GPTQConfig(group_size=8), [tokens], progress=False)
    save_quantized(model, tmp_path / "model.safetensors")
    other = transformers.GPT2LMHeadModel(config).eval()
    load_quantized_(other, tmp_path / "model.safetensors")
    assert torch.equal(other(tokens).logits, model(tokens).logits)
    model.save_pretrained(tmp_path / "folder")
    from safetensors.torch import load_file

    state = load_file(tmp_path / "folder" / "model.safetensors")
    assert "transformer.h.0.attn.c_attn.packed_codes" in state
    third = transformers.GPT2LMHeadModel(config).eval()
    quantize_(third, RTNConfig(group_size=8), progress=False)
    missing, unexpected = third.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    assert torch.equal(third(tokens).logits, model(tokens).logits)


def test_what_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_quantized(quantized(), path)
    other = fresh()
    before = {key: value.clone() for key, value in other.state_dict().items()}
    for change, message in [
        (lambda model: setattr(model, "up", nn.Linear(8, 12)), "no linear layer up of shape"),
        (lambda model: setattr(model, "up", nn.Identity()), "no linear layer up of shape"),
        (lambda model: delattr(model, "up"), "no linear layer up of shape"),
        (lambda model: setattr(model, "up", nn.Linear(8, 16, bias=False)), "up has a bias in one"),
        (lambda model: delattr(model, "unused"), r"it has no unused\.weight"),
        (lambda model: setattr(model, "unused", nn.Linear(8, 9)), r"unused\.weight is of shape"),
        (lambda model: setattr(model, "more", nn.Linear(1, 1)), r"there is no more\.weight"),
    ]:
        model = fresh()
        change(model)
        modules = dict(model.named_modules())
        with pytest.raises(ValueError, match=rf"^load_quantized_: .* does not fit .*{message}"):
            load_quantized_(model, path)
        assert dict(model.named_modules()) == modules
        for key, value in model.state_dict().items():
            if key in before and before[key].shape == value.shape and "up." not in key:
                assert torch.equal(value, before[key]), key


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    save_quantized(quantized(), path)
    content = path.read_bytes()

    def failing(*_: Any, **__: Any) -> None:
        raise OSError

    monkeypatch.setattr("safetensors.torch.save_file", failing)
    with pytest.raises(OSError):  # noqa: PT011
        save_quantized(quantized(), path)
    assert path.read_bytes() == content


class Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"more": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


@pytest.mark.untyped
def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^save_quantized: model must have layers that are quant"):
        save_quantized(network(), tmp_path / "file")
    with pytest.raises(TypeError, match=r"^save_quantized: model must be a module"):
        save_quantized({}, tmp_path / "file")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^load_quantized_: model must be a module"):
        load_quantized_({}, tmp_path / "file")  # type: ignore[arg-type]
    model = nn.Sequential(nn.Linear(4, 4), Extra(4, 4))
    quantize_(model, RTNConfig(), progress=False)
    with pytest.raises(TypeError, match=r"^save_quantized: model .* 1\._extra_state must be"):
        save_quantized(model, tmp_path / "file")
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"was not written by tilework"):
        load_quantized_(network(), tmp_path / "other")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5)).to(dtype)
    quantize_(model, RTNConfig(bits=5, axis="in", group_size=2), progress=False)
    save_quantized(model, tmp_path / "file")
    other = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5)).to(dtype)
    load_quantized_(other, tmp_path / "file")
    assert_same(other, model)
    layer: Any = other[0]
    found: QuantizedTensor = layer.quantized
    assert (found.dtype, found.axis, found.bits) == (dtype, "in", 5)
    x: Tensor = torch.randn(3, 6, dtype=dtype)
    assert torch.equal(other(x), model(x))
