"""`stabnorm report RUN`: the page as one file that needs no server, or as Markdown for a pull request."""

import base64
import gzip
import html
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stabnorm._checks import check_choice, check_instance
from stabnorm.dashboard.answers import Answer, Answers
from stabnorm.dashboard.definitions import definition
from stabnorm.dashboard.runs import Run
from stabnorm.dashboard.server import WEB
from stabnorm.dashboard.text import number
from stabnorm.dashboard.verdict import Onset, verdict
from stabnorm.monitor._record_format import dumps

_MARKS = {"not finite": "✖", "unstable": "●", "too early": "…", "switching": "…", "switched": "✓", "healthy": "✓"}
_MOST_BYTES = 12e6  # of arrays in a report, before they are compressed
_ARRAYS = 7  # of a map, see `Answers.map`
_MOST_COLUMNS, _LEAST_COLUMNS = 600, 60
_SHOWN = 8  # rows of a table in Markdown

_IMPORT = re.compile(r"^import \{ (.+?) \} from '\./(\w+)\.js';$", re.MULTILINE)
_EXPORT = re.compile(r"^export (?=((?:async )?function|class|const) (\w+))", re.MULTILINE)


def html_report(answers: Answers) -> str:
    """Return the page with all runs in it, as one file: zooming shows what was written, and asks for nothing more.

    Args:
        answers: what is known of the runs, after `Answers.refresh`.
    """
    data = gzip.compress(dumps({"overview": answers.overview(), "answers": _asked(answers)}).encode(), 6, mtime=0)
    title = html.escape(", ".join(run.name for run in answers.runs()))
    policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            f"<title>Stability: {title}</title><style>{WEB.joinpath('style.css').read_text(encoding='utf-8')}</style>",
            f'</head><body><script type="text/plain" id="stabnorm-data">{base64.b64encode(data).decode()}</script>',
            f"<script>{one_script()}\nindex_js.render();</script></body></html>\n",
        ]
    )


def one_script() -> str:
    """Return the page's modules as one script: each becomes a function that returns what the module exports."""
    sources = {
        path.name.removesuffix(".js"): path.read_text(encoding="utf-8")
        for path in WEB.iterdir()
        if path.name.endswith(".js") and path.name != "main.js"
    }
    done: list[str] = []
    script = ["'use strict';"]

    def add(name: str) -> None:
        if name in done:
            return
        for needed in _IMPORT.findall(sources[name]):
            add(needed[1])
        done.append(name)
        exported = ", ".join(match[2] for match in _EXPORT.finditer(sources[name]))
        body = _EXPORT.sub("", _IMPORT.sub(r"const { \1 } = \2_js;", sources[name]))
        script.append(f"const {name}_js = (() => {{\n{body}\nreturn {{ {exported} }};\n}})();")

    add("index")
    return "\n".join(script).replace("</script", "<\\/script")


def _asked(answers: Answers) -> dict[str, Answer]:
    """Return the answers to all that the page may ask, in as many columns as there is room for."""
    runs = answers.runs()
    cells = sum(
        len(run.rows(companion).layers) * len(run.statistics(companion))
        for run in runs
        for companion in run.companions()
    )
    columns = int(np.clip(_MOST_BYTES / (4 * _ARRAYS * max(1, cells)), _LEAST_COLUMNS, _MOST_COLUMNS))
    found: dict[str, Answer] = {}
    for run in runs:
        found[_key("lines", run.name)] = answers.lines(run.name, columns=_MOST_COLUMNS)
        found[_key("switch", run.name)] = answers.switch(run.name, columns=columns)
        for companion in run.companions():
            for name in run.statistics(companion):
                found[_key("map", run.name, companion, name)] = answers.map(run.name, name, companion, columns=columns)
                range_key = _key("range", "", companion, name)
                if range_key not in found:
                    found[range_key] = answers.range(name, companion)
    return found


def _key(question: str, run: str = "", companion: str = "", statistic: str = "") -> str:
    """Return the name under which the page looks for an answer."""
    return "\n".join([question, run, companion, statistic])


def markdown_report(runs: Sequence[Run]) -> str:
    """Return verdicts, alerts and advice as Markdown, worst run first.

    Args:
        runs: after `Run.refresh`.
    """
    judged = sorted(((verdict(run), run) for run in runs), key=lambda pair: (-pair[0].severity, pair[1].name))
    lines = ["# Stability"]
    for found, run in judged:
        lines += ["", f"## {_MARKS[found.state]} {code(run.name)}: {found.state}", "", f"**{plain(found.title)}**", ""]
        lines += [f"- {plain(line)}" for line in (*found.lines, *(f"Note: {note}" for note in run.notes))]
        for onset in found.onsets[:_SHOWN]:
            lines += ["", f"### Step {onset.step:,}: {code(onset.layer)}", "", *_alerts(onset), ""]
            lines += [f"- Where to look: {plain(onset.advice)}", f"- What to try: {plain(onset.remedy)}"]
        if len(found.onsets) > _SHOWN:
            lines += ["", f"and {len(found.onsets) - _SHOWN} more onsets"]
        lines += _furthest(run)
    return "\n".join(lines) + "\n"


def _alerts(onset: Onset) -> list[str]:
    rows = [
        f"| {alert['step']:,} | {code(str(alert['layer']), cell=True)} | {definition(str(alert['statistic'])).plain} "
        f"| {number(float(alert['value']))} |"
        for alert in onset.alerts[:_SHOWN]
    ]
    more = [f"\nand {len(onset.alerts) - _SHOWN} more alerts"] if len(onset.alerts) > _SHOWN else []
    return [plain(onset.sentence), "", "| step | layer | measure | value |", "|---:|---|---|---:|", *rows, *more]


def _furthest(run: Run) -> list[str]:
    """Return a table of the layers that are furthest from their usual value at the end, if any has moved at all."""
    name = next((name for name in ("token_std_mean", "amax") if name in run.statistics()), "")
    values = run.series(name) if name else None
    if values is None or not len(values):
        return []
    layers = run.rows().layers
    usual = run.baseline(name).usual(np.arange(len(values)))
    settled = [column[~np.isnan(column)] for column in usual.T]
    before = np.array([column[min(len(column) - 1, len(column) // 2)] if len(column) else np.nan for column in settled])
    with np.errstate(divide="ignore", invalid="ignore"):
        factors = values[-1] / before
        far = np.abs(np.log(factors))
    order = [i for i in np.argsort(-np.nan_to_num(far), kind="stable").tolist() if far[i] > np.log(1.5)][:_SHOWN]
    if not order:
        return []
    rows = [
        f"| {code(layers[i], cell=True)} | {number(float(values[-1, i]))} | {number(float(before[i]))} "
        f"| ×{number(float(factors[i]))} |"
        for i in order
    ]
    head = f"Layers whose {definition(name).plain} ends furthest from what it was in the middle of the run:"
    return ["", head, "", "| layer | at the end | in the middle | × |", "|---|---:|---:|---:|", *rows]


def code(name: str, *, cell: bool = False) -> str:
    r"""Return a name as Markdown code, whatever is in it.

    Args:
        name: the name.
        cell: whether it stands in a table, where a ``|`` must be escaped. Default: False.

    Example:
        >>> code("a.norm"), code("a`b"), code("a|b\nc", cell=True)
        ('`a.norm`', '``a`b``', '`a\\|b⏎c`')
    """
    name = visible(name) or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", name)), default=0))
    space = " " if name[0] == "`" or name[-1] == "`" else ""
    text = f"{fence}{space}{name}{space}{fence}"
    return text.replace("|", "\\|") if cell else text


def plain(text: str) -> str:
    r"""Return a text that Markdown shows as it is, such as a sentence with a layer's name in it.

    Example:
        >>> plain("<script>*x*</script>"), plain("blocks.0.norm1 was 2")
        ('\\<script\\>\\*x\\*\\</script\\>', 'blocks.0.norm1 was 2')
    """
    return re.sub(r"([\\`*<>|\[\]#~]|(?<!\w)_|_(?!\w))", r"\\\1", visible(text))


def visible(text: str) -> str:
    """Show line ends and leave control characters out, so that a name stays on its line."""
    shown = text.replace("\n", "⏎")
    return re.sub("[\x00-\x1f\x7f\x80-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]", "\N{REPLACEMENT CHARACTER}", shown)


def write_report(folder: str | os.PathLike[str], path: str | os.PathLike[str] | None, format: str = "html") -> Path:
    """Write a report of the runs below a folder, and return its path.

    Args:
        folder: the folder of a run, or one above several.
        path: the file; None takes ``report.html`` or ``report.md`` in the folder.
        format: "html" or "md".

    Raises:
        TypeError: `folder` or `path` is no path.
        ValueError: `format` is unknown.
        FileNotFoundError: there is no record below the folder.
    """
    check_choice("format", format, ("html", "md"))
    check_instance("folder", folder, (str, os.PathLike), "a folder, as a string or a Path")
    if path is not None:
        check_instance("path", path, (str, os.PathLike), "a file, as a string or a Path, or None")
    answers = Answers({"": Path(folder)})
    answers.refresh()
    if not answers.runs():
        raise FileNotFoundError(
            f"no record below {os.fspath(folder)}: give the folder that a run with StabilityCallback wrote to"
        )
    text = html_report(answers) if format == "html" else markdown_report(answers.runs())
    target = Path(folder) / f"report.{format}" if path is None else Path(path)
    target.write_text(text, encoding="utf-8")
    return target
