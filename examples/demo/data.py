"""Text that every machine has: the sources of Python's standard library."""

import sysconfig
import zlib
from pathlib import Path

import torch
from torch import Tensor

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
ONE_IN = 16  # files are for validation


def read_corpus() -> tuple[Tensor, Tensor]:
    """The bytes of the files for training and of those for validation, uint8."""
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    texts: tuple[bytearray, bytearray] = bytearray(), bytearray()
    for name in names:
        if LEFT_OUT.isdisjoint(Path(name).parts):
            # By a hash of its name, a file is on the same side in every version of Python.
            texts[zlib.crc32(name.encode()) % ONE_IN == 0].extend((root / name).read_bytes())
    training, validation = (torch.frombuffer(text, dtype=torch.uint8) for text in texts)
    return training, validation


def draw(text: Tensor, batch: int, context: int, generator: torch.Generator) -> Tensor:
    """Random windows of the text, int64 of shape ``(batch, context)``."""
    starts = torch.randint(len(text) - context, (batch, 1), generator=generator)
    return text[starts + torch.arange(context)].long()


def spread(text: Tensor, count: int, context: int) -> Tensor:
    """Windows at equal distances over the whole text, int64 of shape ``(count, context)``."""
    starts = torch.linspace(0, len(text) - context, count, dtype=torch.float64).long()
    return text[starts[:, None] + torch.arange(context)].long()
