"""The command `stabnorm`. It imports nothing heavy before a subcommand runs."""

import argparse
import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import stabnorm
from stabnorm.errors import StabNormError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, 1 after an error, or 2 for arguments it does not understand.

    >>> main(["plan", "nowhere:factory"])
    1
    """
    parser = argparse.ArgumentParser(prog="stabnorm", description="See, switch and ship normalization layers.")
    parser.add_argument("--version", action="version", version=f"stabnorm {stabnorm.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    _add_plan(commands)
    _add_view(commands)
    _add_report(commands)
    _add_replay(commands)
    _add_remedies(commands)
    options = parser.parse_args(arguments)
    run: Callable[[argparse.Namespace], str] = options.run
    try:
        print(run(options))
    except _Failure as failure:
        print(f"stabnorm {options.command}: error: {failure}", file=sys.stderr)
        return 1
    return 0


class _Failure(Exception):
    """An error that is printed for the user, without a traceback of our own."""


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], str], summary: str, description: str
) -> argparse.ArgumentParser:
    """Add a subcommand, which prints what `run` returns for its options."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run=run)
    return parser


# --- stabnorm plan ---

_PLAN = """\
Say for each norm of a model what switching it would lose, what it would gain, and where fold_norms would put it.

The factory takes no arguments and returns (model, example). The model may be fresh or trained, in any mode. The example
holds the model's arguments: a tensor, a tuple of positional arguments, a dict of keyword arguments, a tuple (args,
kwargs), or a list of these. Affine residuals need real data and many tokens: pass a list of real inputs. Modules are
also looked for in the current directory."""


def _add_plan(commands: Any) -> None:
    parser = _command(commands, "plan", _plan, "what switching and folding a model would bring", _PLAN)
    parser.add_argument("factory", type=_reference, help="the function that builds both, as package.module:factory")


def _reference(text: str) -> tuple[str, str]:
    module, colon, name = text.partition(":")
    if not (module and colon and name):
        raise argparse.ArgumentTypeError(f"{text!r} is no factory: write package.module:factory")
    return module, name


def _plan(options: argparse.Namespace) -> str:
    factory, called = _find(*options.factory)
    model, example = _model_and_example(_call(factory, called), called)
    from stabnorm.fold.planned import plan_fold

    try:
        return str(plan_fold(model, example))
    except (StabNormError, TypeError, ValueError) as error:
        raise _Failure(str(error)) from error


def _find(module_name: str, name: str) -> tuple[Callable[[], Any], str]:
    called = f"{module_name}:{name}"
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # `python -m` does this, and an installed command does not
    try:
        factory: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise _Failure(
                f"there is no module {error.name!r} here, nor among the installed packages. Run from the folder that "
                "holds it, and write it with dots"
            ) from error
        raise _of_the_user(error, f"{module_name} cannot be imported") from error
    except Exception as error:
        raise _of_the_user(error, f"{module_name} cannot be imported") from error
    for part in name.split("."):
        if not hasattr(factory, part):
            raise _Failure(f"{module_name} has no {name!r}")
        factory = getattr(factory, part)
    if not callable(factory):
        raise _Failure(
            f"{called} is no function but of type {type(factory).__name__}. Name one that returns (model, example)"
        )
    return factory, called


def _call(factory: Callable[[], Any], called: str) -> Any:
    try:
        return factory()
    except Exception as error:
        raise _of_the_user(error, f"{called} failed") from error


def _of_the_user(error: BaseException, what: str) -> _Failure:
    """Print the traceback of the user's own code, and return the failure to report."""
    frame = error.__traceback__
    while frame is not None and _is_machinery(frame.tb_frame.f_code.co_filename):
        frame = frame.tb_next
    traceback.print_exception(type(error), error, frame)
    return _Failure(f"{what}: {type(error).__name__}: {error}")


def _is_machinery(file: str) -> bool:
    return file == __file__ or "importlib" in file


def _model_and_example(made: Any, called: str) -> tuple[Any, Any]:
    from torch import nn

    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], nn.Module):
        what = type(made).__name__
        if isinstance(made, tuple):
            what = f"tuple ({', '.join(type(part).__name__ for part in made)})"
        raise _Failure(f"{called} returned a {what}. Return (model, example), the model an nn.Module")
    return made


# --- stabnorm view ---

_VIEW = """\
Show the runs below a folder in the browser: verdicts, alerts, and a map of layers by steps. It reads what
StabilityCallback wrote, with any logger, follows runs that still train, and needs neither TensorBoard nor torch."""


def _add_view(commands: Any) -> None:
    parser = _command(commands, "view", _view, "show runs in the browser, live", _VIEW)
    parser.add_argument("folder", help="the folder of a run, or one above several")
    parser.add_argument("--port", type=int, default=6007, help="0 takes a free one (default: 6007)")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (default: 127.0.0.1, this machine only)")


def _view(options: argparse.Namespace) -> str:
    from stabnorm.dashboard.view import serve

    if not os.path.isdir(options.folder):
        raise _Failure(f"there is no folder {options.folder!r}")
    try:
        server = serve(options.folder, options.host, options.port)
    except OSError as error:
        raise _Failure(
            f"{options.host}:{options.port} cannot be used ({error}); give another --port, 0 for a free one"
        ) from error
    with server:
        print(
            f"stabnorm shows {options.folder} at http://{options.host}:{server.server_port}/  (Ctrl-C ends it)",
            flush=True,
        )
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    return "ended"


# --- stabnorm report ---

_REPORT = """\
Write a report on the runs below a folder: the page as one file that needs no server, or Markdown for a pull request. It
works on a run that was killed, too.

Given a file instead of a folder, it looks at a training that was made without stabnorm: a trainer_state.json, a
metrics.csv, or another log with a column of losses. It says where loss or gradient norm left their usual range."""


def _add_report(commands: Any) -> None:
    parser = _command(commands, "report", _report, "write a report of runs as one file", _REPORT)
    parser.add_argument("folder", help="the folder of a run, or one above several; or a log of another trainer")
    parser.add_argument(
        "-o", "--output", help="the file (default: report.html or report.md in the folder; of a log, the terminal)"
    )
    parser.add_argument("--format", choices=("html", "md"), help="default: what the output's name says, else html")


def _report(options: argparse.Namespace) -> str:
    from stabnorm.dashboard.report import write_report

    if os.path.isfile(options.folder):
        from stabnorm.dashboard.training_log import write_log_report

        if options.format == "html" or (options.output or "").endswith((".html", ".htm")):
            raise _Failure("the report on a log is Markdown: leave --format out, or name a file that ends with .md")
        try:
            return write_log_report(options.folder, options.output)
        except (OSError, ValueError) as error:
            raise _Failure(str(error)) from error
    named = "md" if (options.output or "").endswith(".md") else "html"
    try:
        return f"the report is in {write_report(options.folder, options.output, options.format or named)}"
    except OSError as error:
        raise _Failure(str(error)) from error


# --- stabnorm remedies ---

_REMEDIES = """\
List the symptoms that the monitor sees, the statistics that show them, and the remedies. docs/remedies.md describes
each of them."""


def _add_remedies(commands: Any) -> None:
    parser = _command(commands, "remedies", _remedies, "what to do about which symptom", _REMEDIES)
    parser.add_argument("statistic", nargs="?", help="only what answers this statistic (default: all)")


def _remedies(options: argparse.Namespace) -> str:
    from stabnorm.remedies.symptoms import remedies_list

    try:
        return remedies_list(options.statistic)
    except ValueError as error:
        raise _Failure(str(error)) from error


# --- stabnorm replay ---

_REPLAY = """\
Run the step of a dump again, with the weights, the batch and the random states that it had, and print the figures
beside the recorded ones. A LightningModule is built as it was, from its hyperparameters; for any other model name a
function that returns it, with any weights."""


def _add_replay(commands: Any) -> None:
    parser = _command(commands, "replay", _replay, "run the step of a dump again", _REPLAY)
    parser.add_argument("dump", help="the folder of a dump, in `dumps/` of the run's folder")
    parser.add_argument(
        "--model", type=_reference, help="the function that returns the model, as package.module:function"
    )
    parser.add_argument(
        "--loss", type=_reference, help="a function of (model, batch) that returns the loss (default: training_step)"
    )
    parser.add_argument("--checkpoint", help="a checkpoint with the weights, if the dump has none")
    parser.add_argument("--device", default="cpu", help="where to run it (default: cpu)")
    parser.add_argument("--trust", action="store_true", help="read objects of any class, which runs code of the dump")


def _replay(options: argparse.Namespace) -> str:
    import torch
    from torch import nn

    from stabnorm.recorder.again import replay
    from stabnorm.recorder.dump import read_dump

    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    model = checkpoint = None
    loss: Any = None
    if options.model:
        function, called = _find(*options.model)
        model = _call(function, called)
        if not isinstance(model, nn.Module):
            raise _Failure(f"{called} returned a {type(model).__name__}. Return the model, an nn.Module")
    if options.loss:
        loss, _ = _find(*options.loss)
    try:
        if options.checkpoint:
            checkpoint = torch.load(options.checkpoint, map_location="cpu", weights_only=not options.trust)
        dump = read_dump(options.dump, trust=options.trust)
        return str(replay(dump, model, loss, device=options.device, checkpoint=checkpoint))
    except (OSError, StabNormError) as error:
        raise _Failure(str(error)) from error
    except Exception as error:
        raise _of_the_user(error, "the step cannot be run again") from error


if __name__ == "__main__":
    sys.exit(main())
