"""Layers that were quantized before an interruption, in a folder."""

import hashlib
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from tilework.quant.layers.quant_linear import QuantLinear
from tilework.quant.models._candidates import Candidate
from tilework.quant.models._config import Config
from tilework.quant.models._files import described, form_of, read, write
from tilework.quant.models.report import LayerReport


class Checkpoint:
    """A file for each layer that is done; a file of other weights or options is refused."""

    def __init__(self, folder: str | Path, config: Config, sequential: bool) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._work = f"{config!r}, sequential={sequential}"

    def _path(self, layer: Candidate) -> Path:
        return self._folder / f"{layer.name}.safetensors"

    def load(self, layer: Candidate) -> tuple[QuantLinear, LayerReport] | None:
        """The layer that is done; None if it is not."""
        path = self._path(layer)
        if not path.exists():
            return None
        tensors, header = read("quantize_", path)
        if header["work"] != self._work or header["weight"] != _fingerprint(layer.weight):
            raise ValueError(
                f"quantize_: checkpoint must be of the same model and options, but {path} is not"
            )
        device = layer.weight.device
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        new = QuantLinear(form_of(header["form"]).put_together(tensors), layer.bias)
        return new, LayerReport(**header["report"])

    def save(self, layer: Candidate, new: QuantLinear, report: LayerReport) -> None:
        """Keep a layer that is done."""
        header = {
            "work": self._work,
            "weight": _fingerprint(layer.weight),
            "form": described(new.form),
            "report": asdict(report),
        }
        write(self._path(layer), dict(new.named_buffers()), header)


def _fingerprint(weight: Tensor) -> str:
    values = weight.contiguous().cpu().view(torch.uint8)
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()
