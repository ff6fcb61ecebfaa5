"""Run a function in several processes that form a gloo group, and collect what each returns.

That takes some seconds: the first call in a session imports torch once more.
"""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from helpers import SEED

# They are forked from one that has imported what takes long.
multiprocessing.set_forkserver_preload(
    ["torch.distributed.tensor", "tilework.losses", "tilework.norms", "hypothesis", "pytest"]
)


def run(function: Callable[[], Any], processes: int) -> list[Any]:
    """What a function of a module returns in each process, in the order of ranks."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _enter, (function, processes, folder), processes, start_method="forkserver"
        )
        return [
            torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(processes)
        ]


def _enter(rank: int, function: Callable[[], Any], processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    store = torch.distributed.FileStore(os.path.join(folder, "store"), processes)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    result = Path(folder) / f"{rank}.pt"
    torch.save(function(), result.with_suffix(".part"))
    result.with_suffix(".part").rename(result)
    # Ending groups while others still talk makes gloo abort now and then.
    while len(list(Path(folder).glob("*.pt"))) < processes:
        time.sleep(0.01)
    os._exit(0)
