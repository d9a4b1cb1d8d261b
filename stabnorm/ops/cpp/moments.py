"""The C++ backend of `moments`, see `moments.cpp`."""

import ctypes

import torch
from torch import Tensor

from stabnorm.functional import Kind, RawMoments
from stabnorm.ops.aten import moments as aten
from stabnorm.ops.cpp.library import TYPES, call, function, maybe_whole, shape_of
from stabnorm.ops.moments import Request, add_moments_

KINDS: dict[Kind, int] = {"batch": 0, "layer": 1, "rms": 2}  # the kinds that the C++ code knows


@add_moments_.backend("cpp", in_graphs=True)
def add_moments_of_rows_(rows: Tensor, valid: Tensor | None, into: RawMoments, request: Request) -> None:
    """See `ops.moments.add_moments_`."""
    if request.kind not in KINDS:
        aten.add_moments_of_rows_(rows, valid, into, request)
        return
    rows = rows.contiguous()
    call(
        "moments", rows, *shape_of(rows), maybe_whole(valid), KINDS[request.kind], request.tokens, request.normalized,
        request.eps, torch.get_num_threads(), *addresses(into),
    )  # fmt: skip


def addresses(into: RawMoments) -> tuple[Tensor, Tensor, int, Tensor]:
    """Return what C++ is told about one layer's accumulator."""
    return into.seen, into.channel, into.channel.stride(0), into.token


class _Prepared(ctypes.Structure):
    """The struct of the same name in `moments.cpp`."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("type", "rows", "channels", "kind", "tokens", "stride")),
        *((name, ctypes.c_void_p) for name in ("seen", "channel", "token")),
        ("eps", ctypes.c_double),
    )


class PreparedMoments:
    """`add_moments_of_rows_` for inputs of one shape and dtype, contiguous and without a mask.

    Args:
        rows: such an input.
        into: the layer's accumulator.
        kind: what the layer is, one of `KINDS`.
        eps: its epsilon.
        tokens: see `Request`.
    """

    def __init__(self, rows: Tensor, into: RawMoments, kind: Kind, eps: float, tokens: bool) -> None:
        seen, channel, stride, token = addresses(into)
        self._into = into  # keeps its memory
        self._prepared = _Prepared(
            TYPES[rows.dtype], *rows.shape, KINDS[kind], tokens, stride,
            seen.data_ptr(), channel.data_ptr(), token.data_ptr(), eps,
        )  # fmt: skip
        self._address, self._add = ctypes.addressof(self._prepared), function("prepared_moments")

    def add(self, x: Tensor, normalized: bool) -> None:
        """Add an input's moments; `normalized` is that of `Request`."""
        self._add(x.data_ptr(), self._address, normalized, torch.get_num_threads())
