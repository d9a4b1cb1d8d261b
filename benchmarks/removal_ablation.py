"""Compare removing LayerNorm after the training with removing it during it: `python -m benchmarks.removal_ablation`.

The two small transformers of the examples are trained from scratch. "after" trains with LayerNorm, and then runs
`remove_norms` with a fit and a repair on the training inputs without their labels. "during" trains with
`ProgressiveNormCallback`. Both start from the same weights and use the same batches. The final model is judged in eval
mode, without the removed norms.

Seconds are those of training and removal together. The output is a table for each task, with differences to LayerNorm
that are paired by seed.

Args: --tasks, --seeds N, --first-seed N, --steps N, --repair N (steps of the repair), --jobs N.
"""

import argparse
import copy
import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn

from benchmarks.switch_study import interval, judge, tasks
from stabnorm import find_norms, fold_norms, remove_norms
from stabnorm.callbacks import ProgressiveNormCallback
from stabnorm.examples.digits import augment
from stabnorm.pretrained import Recipe

METHODS = ("LayerNorm", "after: fit", "after: fit + repair", "during")


@dataclass(frozen=True)
class Run:
    """The result of one method on one seed."""

    task: str
    method: str
    seed: int
    loss: float
    error: float
    seconds: float
    norms: int  # left at the end


class Inputs:
    """The inputs of a training loader, without targets."""

    def __init__(self, loader: Any, change: Callable[[Tensor], Tensor]) -> None:
        self._loader, self._change = loader, change

    def __iter__(self) -> Iterator[Tensor]:
        return (self._change(batch[0]) for batch in self._loader)


def fit(model: LightningModule, loader: Any, steps: int, callbacks: Sequence[Callback] = ()) -> float:
    """Train, and return the seconds."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        Trainer(
            accelerator="cpu", max_steps=steps, gradient_clip_val=1.0, limit_val_batches=0, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=list(callbacks), default_root_dir=scratch,
        ).fit(model, loader)  # fmt: skip
    return time.perf_counter() - start


def runs(job: tuple[str, int, int, int]) -> list[Run]:
    """Run all methods on one seed."""
    name, seed, steps, repair = job
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    task = tasks(None)[name]
    change = augment if task.judged_by == "error" else (lambda windows: windows[:, :-1])

    def fresh() -> tuple[LightningModule, Any, Sequence[Tensor]]:
        seed_everything(seed, verbose=False)
        model = task.model(lr=task.learning_rate, warmup_steps=max(1, steps // 20))
        train, test = task.loaders(task.batch)
        (batch,) = test
        return model, train, batch

    model, train, batch = fresh()
    trained = fit(model, train, steps)
    original = cast(nn.Module, copy.deepcopy(model).eval())
    finished = [_run(name, METHODS[0], seed, original, batch, trained)]
    inputs = Inputs(train, cast(Callable[[Tensor], Tensor], change))
    for method, more in ((METHODS[1], 0), (METHODS[2], repair)):
        torch.manual_seed(seed)
        start = time.perf_counter()
        result = remove_norms(original, inputs, steps=more, recipe=Recipe(lr=1e-3, forcing=0.5, seed=seed))
        finished.append(_run(name, method, seed, result.model, batch, trained + time.perf_counter() - start))
    model, train, batch = fresh()
    switch = ProgressiveNormCallback()
    taken = fit(model, train, steps, [cast(Callback, switch)])
    start = time.perf_counter()
    folded = fold_norms(cast(nn.Module, model.eval()), batch[0][:2] if task.judged_by == "error" else batch[0][:2, :-1])
    finished.append(_run(name, METHODS[3], seed, folded.model, batch, taken + time.perf_counter() - start))
    return finished


def _run(task: str, method: str, seed: int, model: nn.Module, batch: Sequence[Tensor], seconds: float) -> Run:
    return Run(task, method, seed, *judge(model, batch), seconds, len(find_norms(model)))


def table(finished: Sequence[Run], name: str) -> Iterator[str]:
    """Return the table of one task as Markdown."""
    judged = tasks(None)[name].judged_by
    unit, digits = ("%", 1) if judged == "error" else ("nats", 3)
    base = {run.seed: getattr(run, judged) for run in finished if run.method == METHODS[0]}
    yield f"\n**{name}** ({judged} in {unit}; lower is better)\n"
    yield "| method | runs | mean | minus LayerNorm, 95 % | seconds | norms left |"
    yield "|---|---:|---:|---:|---:|---:|"
    for method in METHODS:
        these = [run for run in finished if run.method == method]
        values = [getattr(run, judged) for run in these]
        differences = [value - base[run.seed] for value, run in zip(values, these, strict=True)]
        seconds, norms = (statistics.mean(getattr(run, key) for run in these) for key in ("seconds", "norms"))
        spread = "" if method == METHODS[0] else interval(differences, digits)
        mean = f"{statistics.mean(values):.{digits}f}"
        yield f"| {method} | {len(these)} | {mean} | {spread} | {seconds:.0f} | {norms:.1f} |"


def main(arguments: Sequence[str] | None = None) -> list[Run]:
    """Do all runs, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["digits", "characters"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=20)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--repair", type=int, default=200, help="steps of the repair")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    jobs = [(task, seed, options.steps, options.repair) for task, seed in itertools.product(options.tasks, seeds)]
    if options.jobs == 1:
        finished = [run for job in jobs for run in runs(job)]
    else:
        with multiprocessing.get_context("spawn").Pool(min(options.jobs, len(jobs))) as pool:
            finished = [run for batch in pool.imap(runs, jobs) for run in batch]
    for name in options.tasks:
        print("\n".join(table([run for run in finished if run.task == name], name)))
    return finished


if __name__ == "__main__":
    main()
