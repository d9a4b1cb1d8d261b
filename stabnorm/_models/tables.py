"""Tables in plain text."""

from collections.abc import Sequence

from stabnorm._log import printable


def aligned(rows: Sequence[Sequence[str]], indent: int = 0) -> list[str]:
    r"""Write rows of cells as lines: each column as wide as its widest cell, two spaces between columns.

    Args:
        rows: with as many cells each.
        indent: spaces before each line. Default: 0.

    >>> print("\n".join(aligned([("norm", "kind"), ("encoder.0", "layer")], indent=2)))
      norm       kind
      encoder.0  layer
    """
    rows = [list(map(printable, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [" " * indent + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
