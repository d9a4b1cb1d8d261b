"""What the tests of the Triton kernels share: on a GPU they run for real, elsewhere under Triton's interpreter.

The interpreter proves arithmetic and masking, at some 100 000 elements a second; hence small inputs. What is not
written is found by filling new memory with NaN.
"""

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from stabnorm.ops.selftest import TOLERANCES

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if GPU else "cpu")
MARKS = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.usefixtures("nan_in_new_memory"),
    pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning"),  # NumPy's, of the interpreter
    pytest.mark.gpu if GPU else pytest.mark.slow,
]
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or no matrix product is deterministic
DTYPES = list(TOLERANCES)


def _patch_the_language_once() -> None:
    """Let Triton's interpreter prepare `triton.language` for a kernel, and not again for each function that it calls.

    That takes milliseconds, and so half of the time of these tests.
    """
    from triton import language
    from triton.runtime import interpreter

    done: set[frozenset[int]] = set()

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        modules = frozenset(id(v) for v in function.fn.__globals__.values() if v in (language, language.core))
        if modules not in done:
            done.add(modules)
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    _patch_the_language_once()


@pytest.fixture
def nan_in_new_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # then `torch.utils.deterministic.fill_uninitialized_memory` holds
    yield
    torch.use_deterministic_algorithms(False)


def random_rows(rows: int, channels: int, dtype: torch.dtype = torch.float32, offset: float = 0.0) -> Tensor:
    """Channels of different mean and scale."""
    x = torch.randn(rows, channels) * (torch.rand(channels) + 0.5) + torch.randn(channels) + offset
    return x.to(dtype).to(DEVICE)


def assert_close(got: Tensor, want: Tensor, natural: Tensor | float = 1.0, *, of_rows: bool = False) -> None:
    """Within the table of tolerances; `natural` is the size of what was added up. A dtype is that of its rows."""
    tolerance = TOLERANCES[got.dtype][1] if of_rows else TOLERANCES[torch.float32][0]
    error = torch.where(got == want, 0, (got.double() - want.double()).abs())  # the least of nothing is infinite
    allowed = tolerance * (want.double().abs() + natural) + 1e-30
    assert bool((error <= allowed).all()), (
        f"{float((error / allowed).nan_to_num(torch.inf).max()):.3g} times the error allowed"
    )
