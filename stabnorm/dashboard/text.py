"""Numbers and layer names, short enough for a picture or a table."""

from collections.abc import Sequence

from stabnorm.monitor.words import number as number


def shorten(names: Sequence[str], width: int) -> list[str]:
    """Cut names to about `width` characters, such that different names stay different.

    Where that is too long, what all have in front is dropped, up to a dot; then a piece of the middle goes.

    Args:
        names: full names, dotted.
        width: what to aim at; names that would become equal stay longer.

    Example:
        >>> shorten(["model.layers.0.norm", "model.layers.11.norm"], 16)
        ['0.norm', '11.norm']
        >>> shorten(["encoder_of_the_vision_tower.norm1", "decoder.norm2"], 16)
        ['encoder_…r.norm1', 'decoder.norm2']
    """
    if max(map(len, names), default=0) <= width:
        return list(names)
    parts = [name.split(".") for name in names]
    shared = 0
    while len(names) > 1 and all(
        len(part) > shared + 1 and part[: shared + 1] == parts[0][: shared + 1] for part in parts
    ):
        shared += 1
    names = [".".join(part[shared:]) for part in parts]
    longest, different = max(map(len, names)), len(set(names))
    for limit in range(width, longest):
        for head in sorted(range(limit), key=lambda head: abs(2 * head - width)):  # the middle first
            short = [_cut(name, head, limit) for name in names]
            if len(set(short)) == different:
                return short
    return names


def _cut(name: str, head: int, width: int) -> str:
    return name if len(name) <= width else f"{name[:head]}…{name[len(name) - width + head + 1 :]}"
