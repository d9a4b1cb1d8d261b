"""Two processes that are the ranks of one group, for tests."""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# A process of its own imports these once. The ranks of all tests are forked from it, because each import takes seconds.
IMPORTED = (
    "pytest",
    "pytorch_lightning",
    "stabnorm.monitor.monitor",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.nn.parallel",
)
RANKS = 2
one_after_the_other = pytest.mark.xdist_group("ranks")  # in one process of the tests, which then imports once


def run_ranks(function: Callable[..., None], folder: Path, *args: object) -> None:
    """Run ``function(rank, folder, *args)`` in two processes, on one thread each, which are a gloo group."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"  # Windows
    multiprocessing.set_forkserver_preload(list(IMPORTED))
    passed = (function, folder, args)
    mp.start_processes(_run, passed, nprocs=RANKS, start_method=method)  # type: ignore[no-untyped-call, attr-defined]


def _run(rank: int, function: Callable[..., None], folder: Path, args: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    function(rank, folder, *args)
    dist.barrier()
    os._exit(0)  # to tear a gloo group down now and then aborts the process, or hangs it
