"""Show whether each remedy cures what it is for: `python -m benchmarks.remedies`.

Each case provokes a symptom in a small character model, the same seed once without and once with each remedy:

* *logits*: a learning rate 30 times too large and no warm-up. Attention logits grow beyond 100.
* *depth*: a pre-norm stack of 24 blocks whose branches begin with large weights. The variance of the residual stream
  grows with depth.
* *embedding*: an embedding that begins with a scale of 0.001, trained with SGD. Its first gradients are more than 10
  times those of the others, and the first step makes it far too large.

The statistic is what the monitor has measured: its worst row, averaged over the last tenth of the steps, or for the
embedding at the worst step. A remedy *cures* when the statistic is back within its bound. The growth over depth has no
bound, and a remedy cures it when it halves the rate. The loss is that on 400 test windows after the last step. It is
"no worse" when the mean over the seeds is at most 0.02 nats above that without the remedy.

Every run is a line of `runs/remedies.jsonl`; existing runs are not repeated. All of them take about ten minutes on two
cores.

Args: --seeds N ..., --steps N, --cases NAME ..., --out FILE, --table, --quick.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, repeat
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stabnorm import StabilityMonitor
from stabnorm.companions import AttentionCompanion, EmbeddingCompanion
from stabnorm.examples.characters import ALPHABET, CONTEXT, text_loaders
from stabnorm.remedies import (
    freeze_embedding,
    mix_norm,
    peri_norm,
    qk_clip,
    qk_norm,
    scale_by_depth,
    scale_residuals,
    sigma_reparametrize,
    stable_embedding,
)  # fmt: skip

SEEDS, STEPS = (0, 1, 2), 120
NONE = "none"
WORSE = 0.02  # nats
Change = Callable[[nn.Module], object]


class Text(nn.Module):
    """A causal pre-norm transformer of torch's own encoder layers."""

    def __init__(self, depth: int, width: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(ALPHABET), width)
        self.positions = nn.Parameter(0.5 * torch.randn(CONTEXT, width))
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        for block in self.encoder.layers:  # torch gives all layers the numbers of the first
            for parameter in block.parameters():
                if parameter.ndim > 1:
                    nn.init.xavier_uniform_(parameter)
        self.head = nn.Linear(width, len(ALPHABET))

    def forward(self, codes: Tensor) -> Tensor:
        """Map characters to the logits of the next one."""
        length = codes.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        x = self.embed(codes) + self.positions[:length]
        return self.head(self.encoder(x, mask=mask, is_causal=True))  # type: ignore[no-any-return]


class OwnAttention(Text):
    """The same, with the attention of `examples.digits`, whose projection is a layer that `qk_norm` can change."""

    def __init__(self, depth: int, width: int, heads: int) -> None:
        from stabnorm.examples.digits import Block

        nn.Module.__init__(self)
        self.embed = nn.Embedding(len(ALPHABET), width)
        self.positions = nn.Parameter(0.5 * torch.randn(CONTEXT, width))
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(ALPHABET))

    def forward(self, codes: Tensor) -> Tensor:
        """Map characters to the logits of the next one."""
        x = self.embed(codes) + self.positions[: codes.shape[1]]
        return self.head(self.norm(self.blocks(x)))  # type: ignore[no-any-return]


def logits_model() -> nn.Module:
    """Return the model of the case "logits"."""
    return OwnAttention(2, 48, 4)


def deep_model() -> nn.Module:
    """Return 24 blocks whose branches begin three times too large."""
    model = Text(24, 32, 2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("linear2.weight", "out_proj.weight")):
                parameter.mul_(3)
    return model


def embedding_model() -> nn.Module:
    """Return a model whose embedding begins far too small."""
    model = OwnAttention(2, 48, 4)
    nn.init.normal_(model.embed.weight, std=1e-3)
    nn.init.normal_(model.positions, std=1e-3)
    return model


EXAMPLE = torch.zeros(1, 4, dtype=torch.long)


def nothing(model: nn.Module) -> None:
    """The arm without a remedy."""


class Case(NamedTuple):
    """One symptom: the model, how it is trained, the statistic that shows it, and the remedies."""

    build: Callable[[], nn.Module]
    learning_rate: float
    statistic: str
    bound: float | None
    at_the_end: bool  # whether the last tenth of the steps counts, or the worst step
    optimizer: Callable[..., torch.optim.Optimizer]
    remedies: dict[str, Change]


CASES = {
    "logits": Case(
        logits_model, 0.1, "attention_logit_max", 100.0, True, torch.optim.AdamW,
        {"sigma_reparametrize": sigma_reparametrize, "qk_norm": qk_norm, "qk_clip": nothing},
    ),
    "depth": Case(
        deep_model, 1e-3, "depth_growth_rate", None, True, torch.optim.AdamW,
        {
            "scale_by_depth": scale_by_depth,
            "scale_residuals 1/sqrt(n)": lambda m: scale_residuals(m, EXAMPLE, scale="1/sqrt(n)"),
            "scale_residuals 1/n": lambda m: scale_residuals(m, EXAMPLE, scale="1/n"),
            "scale_residuals skipinit": lambda m: scale_residuals(m, EXAMPLE, scale="skipinit"),
            "peri_norm": lambda m: peri_norm(m, EXAMPLE),
            "mix_norm": mix_norm,
        },
    ),
    "embedding": Case(
        embedding_model, 0.5, "embedding_gradient_ratio", 10.0, False, torch.optim.SGD,
        {"stable_embedding": stable_embedding, "freeze_embedding": freeze_embedding},
    ),
}  # fmt: skip


@dataclass
class Outcome:
    """The line of one run."""

    case: str
    remedy: str
    seed: int
    steps: int
    value: float = math.nan
    loss: float = math.nan
    named: bool = False  # whether what the monitor says of this statistic names a remedy of the table
    seconds: float = 0.0

    @property
    def key(self) -> tuple[str, str, int, int]:
        """The values that identify this run."""
        return self.case, self.remedy, self.seed, self.steps


def run(outcome: Outcome, windows: int = 400) -> Outcome:
    """Train once, and fill in the outcome."""
    case = CASES[outcome.case]
    torch.manual_seed(outcome.seed)
    train, test = text_loaders(test_windows=windows)
    model = case.build()
    case.remedies.get(outcome.remedy, nothing)(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = case.optimizer(trained, lr=case.learning_rate, weight_decay=0.0)
    batches = chain.from_iterable(repeat(train))
    start = time.perf_counter()
    companions: list[Any] = []
    companions += [AttentionCompanion()] if outcome.case == "logits" else []
    companions += [EmbeddingCompanion()] if outcome.case == "embedding" else []
    with StabilityMonitor(model, ["token_std_mean", "depth_growth_rate"], companions=companions) as monitor:
        for _ in range(outcome.steps):
            (batch,) = next(batches)
            loss = _loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss)
            if outcome.remedy == "qk_clip":
                track = monitor.companions["attention"]
                qk_clip(model, dict(zip(track.rows, track.history()["attention_logit_max"][-1].tolist(), strict=True)))
        values = _worst(monitor, case.statistic)
    last = values[-max(1, len(values) // 10) :]
    outcome.value = float(last.nanmean() if case.at_the_end else values.nan_to_num(nan=-torch.inf).amax())
    if math.isinf(outcome.value):
        outcome.value = math.nan
    with torch.no_grad():
        outcome.loss = float(_loss(model.eval(), next(iter(test))[0]))
    outcome.named = "stabnorm.remedies." in _advice(case.statistic)
    outcome.seconds = time.perf_counter() - start
    return outcome


def _loss(model: nn.Module, windows: Tensor) -> Tensor:
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def _worst(monitor: StabilityMonitor, statistic: str) -> Tensor:
    """The largest value over the rows at each step; the growth over depth is that of the last norm in the blocks."""
    for track in monitor.companions.values():
        if statistic in track.history():
            history = track.history()[statistic]
            return torch.where(history.isnan(), -torch.inf, history).amax(1).nan_to_num(neginf=torch.nan)
    blocks = [i for i, name in enumerate(monitor.layers) if name.endswith(("norm1", "norm2"))]
    return monitor.history()[statistic][:, blocks[-1]]


def _advice(statistic: str) -> str:
    from stabnorm.dashboard.definitions import definition

    return definition(statistic).advice


# --- the table ---


def verdict(case: Case, value: float, loss: float, without: tuple[float, float]) -> str:
    """Say whether the statistic is back within its bound, and what the loss says."""
    if math.isnan(value):
        cured = "nothing left to measure"
    else:
        goal = case.bound if case.bound is not None else without[0] / 2
        cured = "cured" if value <= goal else "did not help" if value > 0.8 * without[0] else "helped"
    if not math.isfinite(loss):
        return f"{cured}, loss not finite"
    better = loss < without[1] - WORSE
    return f"{cured}, loss {'better' if better else 'no worse' if loss <= without[1] + WORSE else 'worse'}"


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the table of all cases, as Markdown: means over the seeds, and the largest distance from them."""
    lines = [
        "| case | statistic, bound | remedy | statistic | loss, nats | verdict |",
        "|---|---|---|---:|---:|---|",
    ]
    for name, case in CASES.items():
        runs = {arm: [o for o in outcomes if (o.case, o.remedy) == (name, arm)] for arm in (NONE, *case.remedies)}
        if not runs[NONE]:
            continue
        without = fmean(o.value for o in runs[NONE]), fmean(o.loss for o in runs[NONE])
        for arm, some in runs.items():
            if some:
                values, losses = [o.value for o in some], [o.loss for o in some]
                said = "-" if arm == NONE else verdict(case, fmean(values), fmean(losses), without)
                bound = "" if case.bound is None else f", {case.bound:g}"
                lines.append(
                    f"| {name} | `{case.statistic}`{bound} | {arm if arm == NONE else f'`{arm}`'} | {_spread(values)} "
                    f"| {_spread(losses)} | {said} |"
                )
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    middle = fmean(values)
    return f"{middle:.3g} ± {max(abs(value - middle) for value in values):.2g}" if math.isfinite(middle) else "-"


def read(path: Path) -> list[Outcome]:
    """Return the runs that there are."""
    if not path.exists():
        return []
    return [Outcome(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--out", type=Path, default=Path("runs/remedies.jsonl"))
    parser.add_argument("--table", action="store_true", help="only print the table of the runs that there are")
    parser.add_argument("--quick", action="store_true", help="one seed and two steps, to see that everything runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds, options.steps = options.seeds[:1], 2
    done = read(options.out)
    known = {outcome.key for outcome in done}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name in [] if options.table else options.cases:
        for seed in options.seeds:
            for arm in (NONE, *CASES[name].remedies):
                outcome = Outcome(name, arm, seed, options.steps)
                if outcome.key in known:
                    continue
                done.append(run(outcome, windows=8 if options.quick else 400))
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(outcome)) + "\n")
                print(f"{name}, {arm}, seed {seed}: {outcome.value:.4g}, loss {outcome.loss:.4f}", file=sys.stderr)
    print(table([o for o in done if o.steps == options.steps and o.seed in options.seeds]))


if __name__ == "__main__":
    main()
