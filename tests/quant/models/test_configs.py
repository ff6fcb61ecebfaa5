"""The fields of a configuration are the options of its function."""

import dataclasses
import inspect

import pytest

from tilework import quant
from tilework.quant.models import configs

CONFIGS = [getattr(configs, name) for name in configs.__all__]
FUNCTIONS = {
    "AWQ": quant.awq_quantize,
    "AdaDim": quant.adadim_quantize,
    "GPTQ": quant.gptq_quantize,
    "LDLQ": quant.ldlq_quantize,
    "QuIP": quant.quip_quantize,
    "RTN": quant.rtn_quantize,
    "SpQR": quant.spqr_quantize,
    "VPTQ": quant.vptq_quantize,
}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_fields_are_the_options(config: type) -> None:
    fields = {field.name: field.default for field in dataclasses.fields(config)}
    name = config.__name__.removesuffix("Config")
    options = {
        parameter.name: parameter.default
        for parameter in inspect.signature(FUNCTIONS[name]).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    if name == "RTN":
        del options["grid"]
    if name == "AdaDim":
        options["max_tokens"] = 512
    if name in ("RTN", "GPTQ"):
        options["group_size"] = 128
    assert fields == options
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().bits = 3


def test_names() -> None:
    assert quant.RTNConfig(3, None).group_size is None
    assert quant.GPTQConfig(3, 64, "symmetric", True).act_order
    assert quant.LDLQConfig().algorithm == "LDLQ"
    assert quant.SpQRConfig(3).bits == quant.QuIPConfig(3).bits == 3
    assert quant.VPTQConfig(4).vector_length == 4
    assert quant.AWQConfig().max_tokens == quant.AdaDimConfig().max_tokens == 512
