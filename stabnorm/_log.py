"""The package's logger, and how text that came from outside is written to a terminal."""

import logging


def printable(text: str) -> str:
    r"""Return a text on one line in which a terminal finds nothing to obey: each control character is written out.

    Names of layers come from models, checkpoints and records of other people.

    >>> print(printable("encoder\x1b[2J.norm"))
    encoder\x1b[2J.norm
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class _Printable(logging.Filter):
    """Makes each line of a message printable."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = "\n".join(map(printable, record.getMessage().split("\n"))), ()
        return True


logger = logging.getLogger("stabnorm")
logger.addFilter(_Printable())
