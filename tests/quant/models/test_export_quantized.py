"""Models to the layouts that are served, and back."""

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

from tilework.quant import (
    AWQConfig,
    GPTQConfig,
    QuantLinear,
    RTNConfig,
    export_quantized,
    import_quantized_,
    quantize_,
)

from quant.models.networks import ids, network

LAYOUTS = ["gptq", "gptq_v2", "awq", "compressed-tensors"]


def quantized(layout: str, **options: Any) -> Any:
    model = network(width=32)
    config = GPTQConfig(group_size=16, scheme="symmetric", act_order=layout != "awq", **options)
    quantize_(model, config, ids(), progress=False, filter_fn=lambda name, _: name != "down")
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_comes_back(layout: str) -> None:
    model = quantized(layout)
    before = copy.deepcopy(model.state_dict())
    state, config = export_quantized(model, layout=layout, scale_dtype=torch.float32)
    assert json.loads(json.dumps(config)) == config
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)
    assert not any("packed_codes" in key for key in state)
    assert len({value.data_ptr() for value in state.values()}) == len(state)
    other = network(width=32)
    with torch.no_grad():
        other.embedding.weight.zero_()
    import_quantized_(other, state, config)
    assert isinstance(other.up, QuantLinear)
    assert type(other.down) is nn.Linear
    assert other.head.weight is other.embedding.weight
    x = ids()[0]
    torch.testing.assert_close(other.eval()(x), model.eval()(x))
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            found: Any = other.get_submodule(name)
            assert torch.equal(found.quantized.codes, layer.quantized.codes)


def test_configurations() -> None:
    _, config = export_quantized(quantized("gptq"), layout="gptq")
    assert config == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": 4,
        "group_size": 16,
        "desc_act": True,
        "sym": True,
        "lm_head": False,
    }
    _, config = export_quantized(quantized("awq"), layout="awq")
    assert (config["quant_method"], config["version"], config["zero_point"]) == (
        "awq",
        "gemm",
        True,
    )
    assert set(config["modules_to_not_convert"]) == {"head", "unused", "down"}
    _, config = export_quantized(quantized("awq"), layout="compressed-tensors")
    assert config["format"] == "pack-quantized"
    weights = config["config_groups"]["group_0"]["weights"]
    assert (weights["symmetric"], weights["strategy"], weights["group_size"]) == (True, "group", 16)
    assert set(config["ignore"]) == {"head", "unused", "down"}
    model = nn.Sequential(nn.Linear(32, 32))
    quantize_(model, RTNConfig(group_size=None), progress=False)
    _, config = export_quantized(model, layout="gptq_v2")
    assert (config["group_size"], config["sym"], config["desc_act"]) == (-1, False, False)
    state, config = export_quantized(model, layout="compressed-tensors")
    weights = config["config_groups"]["group_0"]["weights"]
    assert (weights["strategy"], weights["group_size"]) == ("channel", None)
    assert "0.weight_zero_point" in state


@pytest.mark.untyped
def test_what_cannot_be_exported() -> None:
    with pytest.raises(ValueError, match=r"^export_quantized: model must have layers that are"):
        export_quantized(network(), layout="gptq")
    with pytest.raises(ValueError, match=r"^export_quantized: layout must be one of"):
        export_quantized(quantized("gptq"), layout="marlin")
    with pytest.raises(TypeError, match=r"^export_quantized: model must be a module"):
        export_quantized({}, layout="gptq")  # type: ignore[arg-type]
    scaled = network(width=32)
    quantize_(scaled, AWQConfig(group_size=16), ids(), progress=False)
    with pytest.raises(ValueError, match=r"^export_quantized: layer down: .*no input_scale"):
        export_quantized(scaled, layout="awq")
    mixed = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    quantize_(mixed, RTNConfig(), progress=False, filter_fn=lambda name, _: name == "0")
    quantize_(mixed, RTNConfig(bits=8), progress=False)
    with pytest.raises(ValueError, match=r"^export_quantized: model must have layers of the same"):
        export_quantized(mixed, layout="gptq")


@pytest.mark.untyped
def test_what_does_not_fit_changes_nothing() -> None:
    state, config = export_quantized(quantized("gptq"), layout="gptq")
    for change, other, message in [
        ({"quant_method": "bitsandbytes"}, {}, "quant_method of config must be one of 'gptq'"),
        ({"bits": 8}, {}, r"layer .*: from_gptq: qweight must be of shape"),
        ({}, {"more.weight": torch.ones(2)}, r"state does not fit the model: it has no more\.weig"),
        ({}, {"up.g_idx": None}, r"layer up: from_gptq: tensors must be qweight"),
        ({}, {"unused.bias": None}, r"there is no unused\.bias"),
        ({}, {"up.bias": None}, "up has a bias in one of them alone"),
    ]:
        model = network(width=32)
        given = {key: value for key, value in (state | other).items() if value is not None}
        with pytest.raises(ValueError, match=rf"^import_quantized_: .*{message}"):
            import_quantized_(model, given, config | change)
        assert not any(isinstance(module, QuantLinear) for module in model.modules())
    for wrong, message in [
        ({"quant_method": "gptq"}, "config must say group_size"),
        ({"quant_method": "awq", "group_size": 16, "bits": 8}, "config must be of version 'gemm'"),
        ({"quant_method": "compressed-tensors"}, "format of config must be 'pack-quantized'"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
            "config_groups must be one group",
        ),
    ]:
        with pytest.raises(ValueError, match=rf"^import_quantized_: {message}"):
            import_quantized_(network(width=32), state, wrong)
    with pytest.raises(ValueError, match=r"^import_quantized_: state must have layers with a qwe"):
        import_quantized_(network(width=32), {}, config)
    with pytest.raises(TypeError, match=r"^import_quantized_: model must be a module"):
        import_quantized_(None, state, config)  # type: ignore[arg-type]
