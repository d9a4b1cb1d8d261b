"""Fixtures for every test."""

import gc
import os
from collections.abc import Iterator

# On the small tensors of the tests one thread is several times faster than two, most of all on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the processes that tests start
# ATen's kernels run on every machine alike. The tests of C++ and of the choice set another value themselves.
os.environ.setdefault("STABNORM_KERNELS", "aten")

import pytest
import torch

from stabnorm._models import masks
from stabnorm.ops import admission, dispatch

if not torch.cuda.is_available():  # before anything imports Triton: it decides once what its functions are
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _ask_about_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tests have masks that leave out more than half."""
    monkeypatch.setattr(masks, "_unasked", 0)


@pytest.fixture(autouse=True)
def _the_kernels_of_one_test_are_not_those_of_the_next() -> Iterator[None]:
    """Fail a test that leaves another setting behind: the next ones would compute other bits."""
    before = dispatch.kernels()
    yield
    left = dispatch.kernels()
    if left != before:
        dispatch.use_kernels(before)
        pytest.fail(f"the test left use_kernels({left!r}) behind")


@pytest.fixture(autouse=True)
def _start_no_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process of a test goes on in the background: that of the kernels counts as started."""
    monkeypatch.setattr(admission, "_running", {torch.device("cpu"): None})


def pytest_collection_finish() -> None:
    """Leave what was imported and collected out of every later garbage collection, which takes a tenth of the time."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the slow tests first, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
