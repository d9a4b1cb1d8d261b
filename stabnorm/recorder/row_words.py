"""The words of `BatchRows`: which samples did it, where in them, and how that is known."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stabnorm.monitor.words import number, times

STANDS_OUT = 3.0  # times the median row

if TYPE_CHECKING:
    from stabnorm.recorder.batch_rows import BatchRow, BatchRows


def sentence_of(found: "BatchRows", suspects: int) -> str:
    """Say which rows did it, or that none did.

    Args:
        found: the rows.
        suspects: how many stand out; `found` shows the worst of them.
    """
    worst, place = found.rows[0], f"the input of {found.layer or 'the norm'}"
    if found.count == 1:
        return f"The batch has one row{_samples(found.rows)}, so that no row can be compared with others."
    others = suspects - len(found.rows)
    rows = f"{_names(found)}{f' and {others} more' if others > 0 else ''} of {found.count}{_samples(found.rows)}"
    it, its, has = ("it", "its", "It has") if suspects == 1 else ("them", "their", "They have")
    broken = math.isinf(worst.largest)
    height = f"{number(worst.largest)}, {_ratio(worst.largest, found.usual)} the median row's {number(found.usual)}"
    value = "a value is not finite" if broken else f"the largest value is {height},"
    seen = f"at {place} {value}{_where(worst, found)}"
    if found.guilty and (broken or worst.largest > STANDS_OUT * found.usual):
        calm = "all values there are finite" if broken else f"the largest is {number(found.without)}"
        return " ".join(filter(None, (f"{rows} did it: {seen}.", _share(found, has), f"Without {it} {calm}.")))
    if found.guilty:
        return f"{rows} did it by {its} loss. {_share(found, has)} Look at the target there."
    if suspects and math.isnan(found.without):
        return f"{rows} stand{'s'[: suspects == 1]} out: {seen}. It could not be tried without {it}."
    if broken:
        return (
            f"No row can be told from the others: {place} is not finite in them, too. Look at the weights before it. "
            "If the optimizer has stepped since, this batch may have broken them itself: with "
            "actions={'non_finite': 'skip'} its rows are compared before the step."
        )
    if suspects and worst.largest > STANDS_OUT * found.usual:
        still = f"without {it} the largest is still {number(found.without)}"
        return f"{rows}: {seen}. But {still}, so look at the weights as well."
    return f"No row stands out: {seen}. Look at the weights, or at what all rows share, rather than at single samples."


def table_of(found: "BatchRows") -> list[str]:
    """Return the rows as lines of a table."""
    lines = [
        f"{'row':>6} {'batch':>6} {'sample':>10} {'max |x|':>12} {'x median':>10}  {'token':<12} {'channels':<18} loss"
    ]
    for row in found.rows:
        sample = "" if row.sample is None else str(row.sample)
        times_usual = row.largest / found.usual if found.usual else math.inf
        token, channels = ", ".join(map(str, row.token)), ", ".join(map(str, row.channels))
        share = "" if math.isnan(row.loss_share) else f"{row.loss_share:.0%}"
        lines.append(
            f"{row.row:>6} {row.micro_batch:>6} {sample:>10} {row.largest:>12.6g} {times_usual:>10.3g}  "
            f"{token:<12} {channels:<18} {share}".rstrip()
        )
    return lines


def _ratio(value: float, usual: float) -> str:
    return times(value / usual, value / usual) if usual else "above"


def _name(found: "BatchRows", row: "BatchRow") -> str:
    return f"row {row.row}" + (f" of micro-batch {row.micro_batch}" if found.micro_batches > 1 else "")


def _names(found: "BatchRows") -> str:
    if found.micro_batches == 1 and len(found.rows) > 1:
        return f"Rows {_listed([str(row.row) for row in found.rows])}"
    names = _listed([_name(found, row) for row in found.rows])
    return names[:1].upper() + names[1:]


def _samples(rows: Sequence["BatchRow"]) -> str:
    known = [f"{row.sample:,}" for row in rows if row.sample is not None]
    return f" (sample{'s'[: len(known) != 1]} {_listed(known)} of the data set)" if known else ""


def _where(row: "BatchRow", found: "BatchRows") -> str:
    many = f" in {_name(found, row)}" if len(found.rows) > 1 or not found.guilty else ""
    token = f" at token {row.token[0]}" if len(row.token) == 1 else f" at position {row.token}" if row.token else ""
    listed = _listed([str(channel) for channel in row.channels])
    return f"{many}{token} in channel{'s'[: len(row.channels) != 1]} {listed}" if listed else f"{many}{token}"


def _share(found: "BatchRows", has: str) -> str:
    if any(math.isinf(row.loss) for row in found.rows):
        return f"{has} a loss that is not finite."
    share = sum(row.loss_share for row in found.rows)
    return "" if math.isnan(share) else f"{has} {share:.0%} of the loss."


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))
