"""Quantize the linear layers of a model, one after another."""

import contextlib
import functools
import importlib.util
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tilework import _checks
from tilework.catalog import without_paper
from tilework.quant._arguments import computed
from tilework.quant.layers.quant_linear import QuantLinear
from tilework.quant.models._calibration import (
    Rows,
    Statistics,
    Survey,
    as_batches,
    evaluating,
    gather,
)
from tilework.quant.models._candidates import Candidate, candidates
from tilework.quant.models._checkpoint import Checkpoint
from tilework.quant.models._config import Config
from tilework.quant.models.report import LayerReport, QuantizationReport
from tilework.quant.statistics.hessian_accumulator import hessian_loss

__all__ = ["quantize_"]


@without_paper("quantizes a model with any of the algorithms")
def quantize_(
    model: nn.Module,
    config: Config,
    calibration: Iterable[Any] | None = None,
    *,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    sequential: bool = True,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> QuantizationReport:
    """Quantize the linear layers of a model in place.

    Each :class:`torch.nn.Linear`, and each ``Conv1D`` of transformers, becomes a
    :class:`QuantLinear` of the result of the algorithm, with its bias and its hooks. Layers come in
    the order in which the first batch reaches them, without statistics in that of
    ``model.named_modules()``. Those that get the very same tensors, as the projections of queries,
    keys and values do, share their statistics, and a batch is run only up to the layer whose
    statistics it is run for.

    Not quantized, as the report says of each: what ``filter_fn`` leaves out; subclasses of
    ``nn.Linear``; layers that calibration never reaches, where statistics are needed; weights that
    another module has too, such as a tied head; weights that are not floating, lie on meta or are
    distributed; the model itself.

    An error, or an interruption, leaves the layers before it quantized and the others as they were.

    Args:
        model: A module with linear layers.
        config: An algorithm with its options, such as :class:`GPTQConfig`.
        calibration: Batches: a tensor is passed as ``model(batch)``, a tuple or list as
            ``model(*batch)`` and a dict as ``model(**batch)``, without gradients and in evaluation
            mode. :class:`RTNConfig` needs and runs none.
        filter_fn: Says of a name and a layer whether the layer is to be quantized; None is all.
        sequential: Whether the statistics of a layer are those of a model whose earlier layers are
            quantized, with a pass over the batches for each; otherwise one pass over the float
            model is all, with the statistics of all layers in memory at once.
        checkpoint: A folder where each layer is kept as soon as it is done. The same call, with
            the model as it was at first, takes the layers that it finds there from there.
        progress: Whether a bar is shown, where the package ``tqdm`` is installed.

    Returns:
        What was done to each layer; ``print`` it for a table.

    Raises:
        ValueError: Calibration is needed and None or empty, an option of ``config`` is not one that
            the algorithm takes, a layer cannot be quantized, or ``checkpoint`` is of other work.
        TypeError: ``model`` is not a module, ``config`` is not a configuration of this library, or
            a batch is neither a tensor nor a tuple, list or dict.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from tilework.quant import GPTQConfig, quantize_
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
        >>> batches = [torch.randn(32, 64) for _ in range(4)]
        >>> report = quantize_(model, GPTQConfig(bits=4, group_size=32), batches, progress=False)
        >>> list(report.quantized)
        ['0', '2']
        >>> type(model[0])
        <class 'tilework.quant.layers.quant_linear.QuantLinear'>

    Reference:
        Elias Frantar, Saleh Ashkboos, Torsten Hoefler, Dan Alistarh. GPTQ: Accurate Post-Training
        Quantization for Generative Pre-trained Transformers. 2022. arXiv:2210.17323.
    """
    name = "quantize_"
    if not isinstance(model, nn.Module):
        raise _checks.bad_type(name, "model", "a module", model)
    if not isinstance(config, Config):
        raise _checks.bad_type(name, "config", "a configuration such as GPTQConfig()", config)
    if filter_fn is not None and not callable(filter_fn):
        raise _checks.bad_type(name, "filter_fn", "a function or None", filter_fn)
    batches = [] if config.statistics == "none" else as_batches(name, calibration)
    config.check()
    layers, skipped = candidates(model, filter_fn)
    report = QuantizationReport(skipped=skipped)
    kept = None if checkpoint is None else Checkpoint(checkpoint, config, sequential)
    in_order = _in_sequence if sequential else _at_once
    with evaluating(model), _bar(len(layers), progress) as advance:
        for layer, statistics in in_order(model, config, batches, dict(layers)):
            advance(layer.name)
            with _naming(layer):
                found = None if kept is None else kept.load(layer)
                if found is None:
                    found = _quantized(layer, config, statistics)
                    if found is not None and kept is not None:
                        kept.save(layer, *found)
            if found is not None:
                new, report.quantized[layer.name] = found
                layer.replace(new)
                del layers[layer.name]
    report.skipped.update(dict.fromkeys(layers, "calibration never reached it"))
    return report


Source = Callable[[], Tensor | None]
"""Gathers what the algorithm needs to know of a layer's inputs; None if there were none."""


def _in_sequence(
    model: nn.Module, config: Config, batches: list[Any], layers: dict[str, Candidate]
) -> Iterator[tuple[Candidate, Source]]:
    """Layers with their statistics, which are gathered when the layers before are quantized."""
    if not batches:
        yield from ((layer, lambda: None) for layer in layers.values())
        return
    survey = Survey(model, batches, layers.values())
    for group in survey.groups():
        shared: list[Tensor | None] = []
        for name in group:

            def source(layer: Candidate, shared: list[Tensor | None] = shared) -> Tensor | None:
                if not shared:
                    calls = survey.calls(layer.name)
                    found = gather(model, batches, [layer], config.empty_statistics, calls)
                    shared.append(_values(found.get(layer.name)))
                return shared[0]

            layer = layers.pop(name)
            yield layer, functools.partial(source, layer)


def _at_once(
    model: nn.Module, config: Config, batches: list[Any], layers: dict[str, Candidate]
) -> Iterator[tuple[Candidate, Source]]:
    """Layers with their statistics in the float model."""
    if not batches:
        yield from _in_sequence(model, config, batches, layers)
        return
    found = gather(model, batches, layers.values(), config.empty_statistics)
    for name in list(found):
        yield layers.pop(name), functools.partial(_values, found.pop(name))


def _values(statistics: Statistics | None) -> Tensor | None:
    if statistics is None or not statistics.count:
        return None
    return statistics.rows if isinstance(statistics, Rows) else statistics.hessian


def _quantized(
    layer: Candidate, config: Config, source: Source
) -> tuple[QuantLinear, LayerReport] | None:
    """A layer in the place of another, and its report; None if calibration never reached it."""
    start = time.perf_counter()
    statistics = source()
    if statistics is None and config.statistics != "none":
        return None
    weight = layer.weight
    quantized = config.quantize(weight, statistics)
    new = QuantLinear(quantized, layer.bias)
    seconds = time.perf_counter() - start
    loss = rtn_loss = relative_loss = None
    if statistics is not None:
        hessian = config.hessian(statistics)
        wide = computed(weight, hessian)
        loss = float(hessian_loss(weight, quantized.dequantize(wide), hessian))
        total = float(hessian_loss(weight, torch.zeros_like(weight), hessian))
        relative_loss = loss / total if total else 0.0
        nearest = config.nearest(weight)
        if nearest is not None:
            rtn_loss = float(hessian_loss(weight, nearest.dequantize(wide), hessian))
    report = LayerReport(
        algorithm=config.algorithm,
        bits=quantized.code_bits,
        group_size=getattr(config, "group_size", None),
        weights=weight.numel(),
        bits_per_weight=new.bits_per_weight,
        loss=loss,
        rtn_loss=rtn_loss,
        relative_loss=relative_loss,
        seconds=seconds,
    )
    return new, report


@contextlib.contextmanager
def _naming(layer: Candidate) -> Iterator[None]:
    """Name the layer in errors."""
    try:
        yield
    except BaseException as error:
        if type(error) in (ValueError, TypeError, RuntimeError):
            raise type(error)(f"quantize_: layer {layer.name}: {error}") from error
        error.add_note(f"quantize_: layer {layer.name}")
        raise


@contextlib.contextmanager
def _bar(total: int, wanted: bool) -> Iterator[Callable[[str], None]]:
    """Show a bar, if there is what draws it; the function begins the work on a layer."""
    if not wanted or importlib.util.find_spec("tqdm") is None:
        yield lambda name: None
        return
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    with tqdm(total=total, desc="quantize", unit="layer") as bar:

        def advance(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        yield advance
