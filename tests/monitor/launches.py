"""Counts what would launch a kernel on a GPU: kernels of Triton, under its interpreter, and every operation of ATen."""

from collections import Counter
from types import TracebackType
from typing import Any, Self
from unittest import mock

from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

_MEMORY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "resize_")
_READS = ("_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero")


class Launches(TorchDispatchMode):
    """Counts by name what runs in the block; an operation of ATen counts as one kernel, a view and new memory as none.

    `reads` counts what would wait for the GPU to bring a value to the host.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()
        self._in_kernel = False
        run, launches = GridExecutor.__call__, self

        def counted(executor: Any, *args: Any, **kwargs: Any) -> Any:
            launches.names[executor.fn.__name__] += 1
            launches._in_kernel = True  # what the interpreter does with tensors is no launch
            try:
                return run(executor, *args, **kwargs)
            finally:
                launches._in_kernel = False

        self._patch = mock.patch.object(GridExecutor, "__call__", counted)

    @property
    def total(self) -> int:
        """The number of launches."""
        return self.names.total()

    def __enter__(self) -> Self:
        self._patch.start()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        self._patch.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operation, and run it."""
        name = func.overloadpacket.__name__
        returned = [value.alias_info for value in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returned)
        if not self._in_kernel and func.namespace != "stabnorm":  # an op of ours is what it runs inside
            if name in _READS:
                self.reads[name] += 1
            elif not is_view and name not in _MEMORY:
                self.names[name] += 1
        return func(*args, **(kwargs or {}))
