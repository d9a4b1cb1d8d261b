"""Study models whose LayerNorms are switched while they train: `python -m benchmarks.switch_study`.

Small transformers are trained from scratch with LayerNorm, with other norms or with DyT from the first step, and with
the switch of `ProgressiveNormCallback`. All methods of one seed share initial weights, batches, augmentation and
disturbances, so differences to LayerNorm are paired. The final model is judged in eval mode, with running statistics,
because this is the model that folds (DyT does not). The gap is its loss minus the loss with the statistics of the test
batch.

Tasks: digits (the ViT of `examples.digits`), "wide digits" (the same, twice as wide, in batches of 64), characters (the
transformer of `examples.characters`), and with `--data DIR` also cifar (CIFAR-10 as JPEGs, `cifar10_jpeg.npz`) and
shakespeare (`text/tinyshakespeare.txt`).
Settings: calm, and the difficult ones of `SETTINGS`. A run is lost if its end is not finite, or more than 0.1 nats
(text) or 5 points of error (images) above LayerNorm with the same seed.

Every run is a line of `runs/switch_study.jsonl`; existing runs are not repeated.

Args: --tasks, --settings, --methods, --seeds N, --first-seed N, --steps N, --jobs N, --data DIR, --out FILE, --table.
"""

import argparse
import functools
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from benchmarks.cifar import CifarViT, cifar_loaders
from stabnorm.examples.characters import CharacterTransformer, text_loaders
from stabnorm.examples.digits import DigitsViT, digits_loaders

Loaders: TypeAlias = tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]
LOST = {"error": 5.0, "loss": 0.1}


@dataclass(frozen=True)
class Task:
    """A model, its data, and the figure that counts: "error" in percent, or "loss" in nats."""

    model: Callable[..., LightningModule]
    loaders: Callable[[int], Loaders]
    batch: int
    learning_rate: float
    judged_by: str


@dataclass(frozen=True)
class Setting:
    """How the training is made difficult. All of it except `bursts` applies to the test, too."""

    learning_rate: float = 1.0  # times the task's
    batch: int | None = None
    steps: float = 1.0  # times the study's
    bursts: float = 0.0  # share of training batches whose embeddings are BURST times as large
    token_gain: float = 0.0  # sigma of a log-normal factor on every token's embedding
    sample_gain: float = 0.0  # and on every sample's
    loud_tokens: float = 0.0  # share of tokens whose embeddings are BURST times as large


BURST = 30.0
SETTINGS = {
    "calm": Setting(),
    "learning rate x4": Setting(learning_rate=4.0),
    "batch of 4": Setting(batch=4),
    "bursts x30 in 3 % of batches": Setting(bursts=0.03),
    "a third of the steps": Setting(steps=1 / 3),
    "log-normal gain per token": Setting(token_gain=1.2),
    "log-normal gain per sample": Setting(sample_gain=1.2),
    "2 % of tokens x30": Setting(loud_tokens=0.02),
}


@dataclass
class Outcome:
    """The line of one run."""

    task: str
    setting: str
    method: str
    seed: int
    steps: int
    loss: float = math.nan
    error: float = math.nan
    gap: float = math.nan
    seconds: float = 0.0
    norms: int = 0
    kept: dict[str, str] | None = None  # the layers that kept LayerNorm, and why; None where none was to be switched

    @property
    def key(self) -> tuple[str, str, str, int, int]:
        """The values that identify this run."""
        return self.task, self.setting, self.method, self.seed, self.steps


def tasks(data: Path | None) -> dict[str, Task]:
    """Return the tasks whose data are there, by name."""
    by_name = {
        "digits": Task(DigitsViT, digits_loaders, 32, 3e-3, "error"),
        "wide digits": Task(functools.partial(DigitsViT, dim=96), digits_loaders, 64, 3e-3, "error"),
        "characters": Task(CharacterTransformer, text_loaders, 12, 3e-3, "loss"),
    }
    if data is not None:
        text, images = data / "text" / "tinyshakespeare.txt", data / "cifar10_jpeg.npz"
        by_name["shakespeare"] = Task(CharacterTransformer, lambda batch: text_loaders(batch, text), 12, 3e-3, "loss")
        by_name["cifar"] = Task(CifarViT, lambda batch: cifar_loaders(images, batch), 64, 2e-3, "error")
    return by_name


class ChannelsLastBatchNorm(nn.BatchNorm1d):
    """A plain batch norm in the place of LayerNorm: over all tokens, channels last."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., channels) to the same shape."""
        y: Tensor = super().forward(x.flatten(0, -2)).view(x.shape)
        return y


class Disturb:
    """Disturb the tokens that enter the blocks, with random numbers of its own."""

    def __init__(self, setting: Setting, seed: int) -> None:
        self.setting = setting
        self.seed = seed
        self.random = torch.Generator().manual_seed(seed)

    def __call__(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        """Return the disturbed tokens, as a forward pre-hook."""
        (tokens,) = args
        how, random = self.setting, self.random
        if not module.training:
            random = torch.Generator().manual_seed(self.seed + 10**6)  # the same test tokens each time
        shape = tokens.shape[:2]
        if how.token_gain:
            tokens = tokens * (how.token_gain * torch.randn(*shape, 1, generator=random)).exp()
        if how.sample_gain:
            tokens = tokens * (how.sample_gain * torch.randn(shape[0], 1, 1, generator=random)).exp()
        if how.loud_tokens:
            loud = torch.rand(*shape, 1, generator=random) < how.loud_tokens
            tokens = torch.where(loud, BURST * tokens, tokens)
        if how.bursts and module.training and float(torch.rand((), generator=random)) < how.bursts:
            tokens = BURST * tokens
        return (tokens,)


Arm: TypeAlias = Callable[[nn.Module, int], list[Callback]]
"""Gives a model that is trained for so many steps the norms of a method, or returns the callback that does it."""


def converted(to: str, **norm_options: Any) -> Arm:
    """Use another norm from the first step."""

    def arm(model: nn.Module, steps: int) -> list[Callback]:
        from stabnorm import convert_norms

        convert_norms(model, to=to, **norm_options)
        return []

    return arm


def switched(schedule: str, to: Any = "prepbn", exclude: str | None = None, **norm_options: Any) -> Arm:
    """Switch from LayerNorm to another norm during the training."""

    def arm(model: nn.Module, steps: int) -> list[Callback]:
        from stabnorm.callbacks import ProgressiveNormCallback

        callback = ProgressiveNormCallback(to, schedule, exclude=exclude, norm_options=norm_options)
        return [cast(Callback, callback)]

    return arm


def layer_norm(model: nn.Module, steps: int) -> list[Callback]:
    """Leave the model as it is."""
    return []


def batch_norm(model: nn.Module, steps: int) -> list[Callback]:
    """Use torch's batch norm from the first step."""
    for name, norm in list(model.named_modules()):
        if isinstance(norm, nn.LayerNorm):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, ChannelsLastBatchNorm(norm.normalized_shape[0]))
    return []


ARMS: dict[str, Arm] = {
    "LayerNorm": layer_norm,
    "BatchNorm": batch_norm,
    "RepBN": converted("repbn"),
    "UnifiedNorm": lambda model, steps: converted("unified", warmup_steps=steps // 4)(model, steps),
    "DyT": converted("dyt"),
    "linear, published start": switched("linear", init="vision"),  # eta = gamma = 1
    "linear": switched("linear"),
    "adaptive": switched("adaptive"),
    "taper": switched("cosine", to="taper", exclude="^norm$"),  # as published: the last norm stays
}


def run(outcome: Outcome, data: Path | None) -> Outcome:
    """Train once, and fill in the outcome."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    task, setting = tasks(data)[outcome.task], SETTINGS[outcome.setting]
    steps = round(outcome.steps * setting.steps)
    seed_everything(outcome.seed, verbose=False)
    model = task.model(lr=task.learning_rate * setting.learning_rate, warmup_steps=max(1, steps // 20))
    train, test = task.loaders(setting.batch or task.batch)
    model.get_submodule("blocks").register_forward_pre_hook(Disturb(setting, outcome.seed))
    outcome.norms = sum(isinstance(module, nn.LayerNorm) for module in model.modules())
    callbacks = ARMS[outcome.method](model, steps)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:  # the callback's record, which nobody reads
        Trainer(
            accelerator="cpu", max_steps=steps, gradient_clip_val=1.0, limit_val_batches=0, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
            default_root_dir=scratch,
        ).fit(model, train)  # fmt: skip
    outcome.seconds = round(time.perf_counter() - start, 1)
    (batch,) = test
    outcome.loss, outcome.error = judge(model.eval(), batch)
    lams = [float(buffer) for name, buffer in model.named_buffers() if name.endswith(".lam")]
    assert set(lams) <= {0.0, 1.0}, "the switch has not come to its end"
    for callback in callbacks:
        outcome.kept = dict(cast(Any, callback).switch.kept)
    norms = [m for m in model.modules() if getattr(m, "track_running_stats", False) or hasattr(m, "fold_affine")]
    for norm in norms:
        norm.train()
    outcome.gap = outcome.loss - judge(model, batch)[0] if norms else 0.0
    return outcome


@torch.no_grad()
def judge(model: nn.Module, batch: Sequence[Tensor]) -> tuple[float, float]:
    """Return the mean cross-entropy in nats, and the share of wrong answers in percent."""
    inputs, targets = batch if len(batch) == 2 else (batch[0][:, :-1], batch[0][:, 1:])
    logits = model(inputs).flatten(0, -2)
    wrong = logits.argmax(-1) != targets.flatten()
    return float(F.cross_entropy(logits, targets.flatten())), 100 * float(wrong.float().mean())


def read(path: Path) -> dict[tuple[str, str, str, int, int], Outcome]:
    """Return the existing runs; a line that was cut off does not count."""
    outcomes = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            outcome = Outcome(**json.loads(line))
        except ValueError:
            continue
        outcomes[outcome.key] = outcome
    return outcomes


def tables(outcomes: Sequence[Outcome], known: Mapping[str, Task]) -> Iterator[str]:
    """Return one Markdown table for each task and setting."""
    by_key = {(o.task, o.setting, o.method, o.seed): o for o in outcomes}
    for name, setting in itertools.product(known, SETTINGS):
        here = [o for o in outcomes if (o.task, o.setting) == (name, setting)]
        if not here:
            continue
        judged = known[name].judged_by
        unit, digits = ("%", 1) if judged == "error" else ("nats", 3)
        yield f"\n**{name}, {setting}** ({judged} in {unit}; lower is better)\n"
        yield "| method | runs | mean | minus LayerNorm, 95 % | eval minus batch statistics, nats | lost | kept |"
        yield "|---|---:|---:|---:|---:|---:|---:|"
        for method in ARMS:
            these = [o for o in here if o.method == method]
            if not these:
                continue
            values = [getattr(o, judged) for o in these]
            pairs = [(o, by_key.get((name, setting, "LayerNorm", o.seed))) for o in these]
            differences = [getattr(o, judged) - getattr(base, judged) for o, base in pairs if base is not None]
            lost = sum(not difference <= LOST[judged] for difference in differences)
            switching = [o for o in these if o.kept is not None]
            kept = (
                f"{statistics.mean(len(o.kept or ()) for o in switching):.1f} of {these[0].norms}" if switching else ""
            )
            gap = statistics.mean(o.gap for o in these)
            yield (
                f"| {method} | {len(these)} | {statistics.mean(values):.{digits}f} | {interval(differences, digits)} "
                f"| {gap:+.3f} | {lost} | {kept} |"
            )


def interval(differences: Sequence[float], digits: int) -> str:
    """Return the mean and the half width of the 95 % interval by Student's t."""
    if len(differences) < 2 or not all(map(math.isfinite, differences)):
        return "not finite" if differences and not all(map(math.isfinite, differences)) else ""
    half = stats.t.ppf(0.975, len(differences) - 1) * statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{statistics.mean(differences):+.{digits}f} ± {half:.{digits}f}"


def _work(job: tuple[Outcome, Path | None]) -> Outcome:
    return run(*job)


def main(arguments: Sequence[str] | None = None) -> list[Outcome]:
    """Run what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", help="default: all there is data for")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--methods", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="METHOD")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=10, help="the gate's constants were chosen on seeds 0 to 2")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--data", type=Path, help="folder with the larger data sets")
    parser.add_argument("--out", type=Path, default=Path("runs/switch_study.jsonl"))
    parser.add_argument("--table", action="store_true", help="only print what is there")
    options = parser.parse_args(arguments)
    known = tasks(options.data)
    wanted = options.tasks or list(known)
    if unknown := set(wanted) - set(known):
        parser.error(f"no task {', '.join(sorted(unknown))}; there is {', '.join(known)} (the larger ones need --data)")
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    plan = [
        Outcome(task, setting, method, seed, options.steps)
        for seed, task, setting, method in itertools.product(seeds, wanted, options.settings, options.methods)
    ]
    done = read(options.out)
    missing = [] if options.table else [(outcome, options.data) for outcome in plan if outcome.key not in done]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(min(options.jobs, max(1, len(missing)))) as pool:
        for number, outcome in enumerate(pool.imap_unordered(_work, missing), 1):
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
            done[outcome.key] = outcome
            left = (time.perf_counter() - start) / number * (len(missing) - number)
            print(f"\r{number} of {len(missing)} runs, {left / 60:.0f} min left ", end="", file=sys.stderr)
    outcomes = [done[outcome.key] for outcome in plan if outcome.key in done]
    print("\n".join(tables(outcomes, known)))
    return outcomes


if __name__ == "__main__":
    main()
