"""Small trainings in which a symptom is provoked, and the remedies that should cure it, for `benchmarks.remedies`.

A remedy is a function that changes a `Training` before its optimizer is built. Most change the model; the others add
what is called before or after each update, or at the end.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stabnorm import StabilityMonitor, recalibrate_norms
from stabnorm.clipping import AdaptiveClip
from stabnorm.companions import AttentionCompanion, Companion, EmbeddingCompanion, WeightCompanion
from stabnorm.examples.characters import ALPHABET, CONTEXT, text_loaders
from stabnorm.examples.digits import Block, DigitsViT, augment, digits_loaders
from stabnorm.gradient_noise import GradientNoise
from stabnorm.nn import BatchChannelNorm, EvoNormS0
from stabnorm.remedies import (
    WeightProjection,
    dual_patch_norm,
    equalize_channels,
    freeze_embedding,
    lape,
    mix_norm,
    peri_norm,
    qk_clip,
    qk_norm,
    scale_by_depth,
    scale_residuals,
    sigma_reparametrize,
    stable_embedding,
    standardize_weights,
    train_only_norms,
    unmix_norms,
)

NONE = "none"
Batch = Sequence[Tensor]
Optimizer = Callable[..., torch.optim.Optimizer]
AdamW = functools.partial(torch.optim.AdamW, weight_decay=0.0)


class Training:
    """A training that has not begun.

    Args:
        model: what is trained.
        batches: what it is trained on, without an end.
        test: a batch on which it is judged.
        optimizer: makes the optimizer of a list of parameters.
        watched: the statistics of norms that are measured.
        companions: and those of other things.

    Attributes:
        before_update, after_update: called around each step of the optimizer, with the monitor; None where the model
            has no norm.
        at_end: called after the last step, with the model in eval mode.
        begun: called with the optimizer before the first step.
        measured: what a case has measured itself, step by step.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterator[Batch],
        test: Batch,
        optimizer: Optimizer,
        watched: Sequence[str] = ("token_std_mean",),
        companions: Sequence[Companion] = (),
    ) -> None:
        self.model, self.batches, self.test, self.optimizer = model, batches, test, optimizer
        self.watched, self.companions = watched, companions
        self.begun: list[Callable[[torch.optim.Optimizer], object]] = []
        self.before_update: list[Callable[[Any], object]] = []
        self.after_update: list[Callable[[Any], object]] = []
        self.at_end: list[Callable[[], object]] = []
        self.measured: list[float] = []

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean cross-entropy, in nats: of the next character, or of the digit."""
        inputs, targets = batch if len(batch) == 2 else (batch[0][:, :-1], batch[0][:, 1:])
        return F.cross_entropy(self.model(inputs).flatten(0, -2), targets.flatten())


class Case(NamedTuple):
    """One symptom.

    Attributes:
        build: makes the training that has it.
        steps: how many steps it is trained.
        symptom: the statistic by which the monitor names the remedies; "" where none does.
        measured: what stands in the table, in words.
        value: this value, of the training at its end and its monitor; NaN where nothing is left to measure.
        bound: the value at which it counts as cured. Default: half of what it is without a remedy.
        remedies: by name.
    """

    build: Callable[[], Training]
    steps: int
    symptom: str
    measured: str
    value: Callable[[Training, Any], float]
    bound: float | None
    remedies: dict[str, Callable[[Training], object]]


def on_model(remedy: Callable[[Any], object]) -> Callable[[Training], object]:
    """Return a remedy that changes the model."""
    return lambda training: remedy(training.model)


# --- data and models --------------------------------------------------------------------------------------------------


def text(model: nn.Module, optimizer: Optimizer, **watched: Any) -> Training:
    """Train a model to predict the next character."""
    train, test = text_loaders()
    return Training(model, chain.from_iterable(repeat(train)), next(iter(test)), optimizer, **watched)


def images(
    model: nn.Module,
    optimizer: Optimizer,
    batch: int = 32,
    change: Callable[[Tensor], Tensor] = augment,
    for_test: Callable[[Tensor], Tensor] = lambda x: x,
    **watched: Any,
) -> Training:
    """Train a model to recognise digits, whose images are changed."""
    train, test = digits_loaders(batch)
    seen, digits = next(iter(test))
    batches = ([change(x), y] for x, y in chain.from_iterable(repeat(train)))
    return Training(model, batches, [for_test(seen), digits], optimizer, **watched)


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
        nn.Module.__init__(self)
        self.embed = nn.Embedding(len(ALPHABET), width)
        self.positions = nn.Parameter(0.5 * torch.randn(CONTEXT, width))
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(ALPHABET))

    def forward(self, codes: Tensor) -> Tensor:
        """Map characters to the logits of the next one."""
        x = self.embed(codes) + self.positions[: codes.shape[1]]
        return self.head(self.norm(self.blocks(x)))  # type: ignore[no-any-return]


def conv_net(momentum: float = 0.1) -> nn.Sequential:
    """Return three convolutions with batch norms."""
    layers: list[nn.Module] = []
    for i, (inputs, outputs, stride) in enumerate([(1, 16, 1), (16, 32, 2), (32, 32, 1)]):
        layers += [
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=i == 0),
            nn.BatchNorm2d(outputs, momentum=momentum),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def perceptron(depth: int, width: int, normed: bool) -> nn.Sequential:
    """Return linear layers, with a norm before each nonlinearity or without."""
    layers: list[nn.Module] = [nn.Flatten()]
    for i in range(depth):
        layers += [nn.Linear(64 if i == 0 else width, width), nn.LayerNorm(width) if normed else nn.Identity()]
        layers += [nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


EXAMPLE = torch.zeros(1, 4, dtype=torch.long)


# --- the attention, the depth and the embedding of a transformer ------------------------------------------------------


def largest_logit(training: Training, monitor: StabilityMonitor) -> float:
    """The largest logit, averaged over the last tenth of the steps."""
    return last_tenth(monitor.companions["attention"].history()["attention_logit_max"])


def last_tenth(history: Tensor) -> float:
    """The largest row at each step, averaged over the last tenth of the steps; NaN where there is no row."""
    if not history.numel():
        return math.nan
    worst = torch.where(history.isnan(), -torch.inf, history).amax(1)
    last = worst[-max(1, len(worst) // 10) :]
    return float(last[~torch.isneginf(last)].mean())


def growth_over_depth(training: Training, monitor: StabilityMonitor) -> float:
    """The rate up to the last norm in the blocks, averaged over the last tenth of the steps."""
    row = [i for i, name in enumerate(monitor.layers) if name.endswith(("norm1", "norm2"))][-1]
    return last_tenth(monitor.history()["depth_growth_rate"][:, row : row + 1])


def largest_embedding_gradient(training: Training, monitor: StabilityMonitor) -> float:
    """The ratio at the worst step."""
    largest = float(monitor.companions["embedding"].history()["embedding_gradient_ratio"].nan_to_num(nan=-1).amax())
    return largest if largest >= 0 else math.nan


def logits_training() -> Training:
    """Use a learning rate 30 times too large, and no warm-up."""
    return text(OwnAttention(2, 48, 4), functools.partial(AdamW, lr=0.1), companions=[AttentionCompanion()])


def depth_training() -> Training:
    """Begin with 24 blocks whose branches are three times too large."""
    model = Text(24, 32, 2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("linear2.weight", "out_proj.weight")):
                parameter.mul_(3)
    return text(model, functools.partial(AdamW, lr=1e-3), watched=["depth_growth_rate"])


def embedding_training() -> Training:
    """Begin with an embedding that is far too small, and train with SGD."""
    model = OwnAttention(2, 48, 4)
    nn.init.normal_(model.embed.weight, std=1e-3)
    nn.init.normal_(model.positions, std=1e-3)
    return text(model, functools.partial(torch.optim.SGD, lr=0.5), companions=[EmbeddingCompanion()])


def clip_queries_and_keys(training: Training) -> None:
    """Call `qk_clip` after each step, with the logits that the monitor has seen in it."""

    def clip(monitor: StabilityMonitor) -> None:
        track = monitor.companions["attention"]
        logits = track.history()["attention_logit_max"][-1].tolist()
        qk_clip(training.model, dict(zip(track.rows, logits, strict=True)))

    training.after_update.append(clip)


# --- outlier channels in front of a quantiser -------------------------------------------------------------------------


def channels_training() -> Training:
    """Begin with three channels of the embedding that are 30 times as large, and end with norms of 4 bits."""
    model = OwnAttention(2, 48, 4)
    with torch.no_grad():
        model.embed.weight[:, :3] *= 30
    training = text(model, functools.partial(AdamW, lr=3e-3), watched=["channel_spread"])

    def quantise(norm: nn.Module, args: Any, y: Tensor) -> Tensor:
        step = y.abs().amax() / 7
        channels = y.detach().abs().flatten(0, -2).amax(0)
        training.measured.append(float(channels.amax() / channels.median()))
        return (y / step).round() * step

    def begin() -> None:
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.register_forward_hook(quantise)

    training.at_end.append(begin)
    return training


def equalize(training: Training) -> None:
    """Equalise the channels of the trained model, as 360 windows of training text show them."""

    def change() -> None:
        windows = torch.cat([next(training.batches)[0] for _ in range(30)])
        equalize_channels(training.model, windows[:, :-1])

    training.at_end.insert(0, change)


# --- convolutional nets -----------------------------------------------------------------------------------------------


def micro_batch_training() -> Training:
    """Train with two images in a batch."""
    optimizer = functools.partial(torch.optim.SGD, lr=0.02, momentum=0.9)
    return images(conv_net(), optimizer, batch=2, watched=["var_fluctuation"])


def batch_fluctuation(training: Training, monitor: StabilityMonitor | None) -> float:
    """The fluctuation of the norms that normalise with the statistics of the batch."""
    if monitor is None:
        return math.nan
    modules = dict(training.model.named_modules())
    rows = [i for i, name in enumerate(monitor.layers) if isinstance(modules[name], nn.BatchNorm2d)]
    return last_tenth(monitor.history()["var_fluctuation"][:, rows])


def other_norms(make: Callable[[int], nn.Module], standardized: bool, activated: bool = False) -> Any:
    """Return a remedy that puts other norms in the place of batch norms, behind standardized weights or not."""

    def remedy(training: Training) -> None:
        model = training.model
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.BatchNorm2d):
                setattr(model, name, make(module.num_features))
            elif isinstance(module, nn.ReLU) and activated:
                setattr(model, name, nn.Identity())
        if standardized:
            standardize_weights(model)

    return remedy


def eval_training() -> Training:
    """Give the running statistics a momentum of 0.005, so that 120 steps are too few for them."""
    optimizer = functools.partial(torch.optim.SGD, lr=0.02, momentum=0.9)
    return images(conv_net(momentum=0.005), optimizer, change=lambda x: x)


def shift_training() -> Training:
    """Judge a net on images with a third of the contrast, on grey."""
    optimizer = functools.partial(torch.optim.SGD, lr=0.02, momentum=0.9)
    return images(conv_net(), optimizer, for_test=lambda x: 0.3 * x + 0.2, change=lambda x: x)


def stream_training() -> Training:
    """Judge the net on a stream of such images, 16 at a time, in which those of a digit come one after the other."""
    training = shift_training()
    order = training.test[1].argsort(stable=True)
    training.test = [part[order] for part in training.test]
    model, plain = training.model, training.loss

    def in_order(batch: Batch) -> Tensor:
        if model.training:
            return plain(batch)
        parts = zip(*(part.split(16) for part in batch), strict=True)
        return torch.stack([plain(part) * len(part[1]) for part in parts]).sum() / len(batch[1])

    training.loss = in_order  # type: ignore[method-assign]
    return training


def use_batch_statistics(training: Training) -> None:
    """Normalise each batch of the stream with its own statistics."""

    def change() -> None:
        for module in training.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train()

    training.at_end.append(change)


def unmix(training: Training) -> None:
    """Change the trained model."""
    training.at_end.append(lambda: unmix_norms(training.model))


def discrepancy(training: Training, monitor: StabilityMonitor) -> float:
    """What the monitor says of the running statistics now: on the test images, in batches of 32."""
    model = training.model.train()
    with StabilityMonitor(model, ["var_discrepancy"]) as after, torch.no_grad():
        for part in training.test[0].split(32)[:6]:
            model(part)
            after.step()
    history = after.history()["var_discrepancy"]
    return float(torch.where(history.isnan(), -torch.inf, history).amax(1)[1:].mean())


def recalibrated(on_test: bool = False, **options: Any) -> Callable[[Training], None]:
    """Return the remedy that measures running statistics again, on training data or on unlabelled test data."""

    def remedy(training: Training) -> None:
        def recalibrate() -> None:
            batches = [[part] for part in training.test[0].split(32)] if on_test else training.batches
            recalibrate_norms(training.model, batches, 24, **options)

        training.at_end.append(recalibrate)

    return remedy


# --- gradients and lengths --------------------------------------------------------------------------------------------


def spikes_training() -> Training:
    """Let 3 % of the batches have a loss that is 30 times too large, and train with SGD."""
    model = OwnAttention(2, 48, 4)
    optimizer = functools.partial(torch.optim.SGD, lr=0.03, momentum=0.9)
    training = text(model, optimizer, companions=[WeightCompanion()], watched=["gradient_spike"])
    random = torch.Generator().manual_seed(1)
    plain = training.loss

    def spoilt(batch: Batch) -> Tensor:
        bad = model.training and float(torch.rand((), generator=random)) < 0.03
        return plain(batch) * (30.0 if bad else 1.0)

    training.loss = spoilt  # type: ignore[method-assign]
    return training


def largest_update(training: Training, monitor: StabilityMonitor) -> float:
    """The largest update of a matrix, at the worst step."""
    return float(monitor.companions["weights"].history()["update_ratio"].nan_to_num(nan=math.inf).amax())


def clip_gradients(training: Training) -> None:
    """Clip each tensor against its own past."""
    clip = AdaptiveClip([p for p in training.model.parameters() if p.requires_grad], warmup=20)
    training.before_update.append(lambda monitor: clip.step())


def noisy_gradients(eta: float) -> Callable[[Training], object]:
    """Return the remedy that adds noise of this variance, which fades away."""
    return lambda training: training.begun.append(lambda optimizer: GradientNoise(optimizer, eta=eta))


def start_training() -> Training:
    """Begin with weights of zero, which give the hidden layers no gradient."""
    model = perceptron(3, 48, normed=False)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return images(model, functools.partial(torch.optim.SGD, lr=0.1))


def length_training() -> Training:
    """Permute the digits again and again, with a learning rate at which the weights grow."""
    model = perceptron(3, 64, normed=True)
    training = images(model, functools.partial(AdamW, lr=3e-3), companions=[WeightCompanion()], watched=["amax"])
    plain, orders = training.batches, torch.stack([torch.randperm(10) for _ in range(5)])

    def permuted() -> Iterator[Batch]:
        for step, (x, y) in enumerate(plain):
            yield [x, orders[min(step // 100, 4)][y]]

    training.batches = permuted()
    training.test = [training.test[0], orders[4][training.test[1]]]
    return training


def lost_learning_rate(training: Training, monitor: StabilityMonitor) -> float:
    """The first effective learning rate over the last one, of the matrix that lost most; the head is left out."""
    history = monitor.companions["weights"].history()["effective_learning_rate"][:, :-1]
    return float((history[0] / history[-1]).amax())


def keep_lengths(training: Training) -> None:
    """Scale the weights back after each step."""
    projection = WeightProjection(training.model)
    training.after_update.append(lambda monitor: projection.step())


# --- vision transformers ----------------------------------------------------------------------------------------------


def contrasts(x: Tensor) -> Tensor:
    """Give each image a contrast of its own."""
    random = torch.Generator().manual_seed(len(x)) if len(x) > 100 else None  # the same test images each time
    return x * torch.randn(len(x), 1, 1, 1, generator=random).mul(1.5).exp()


def patches_training() -> Training:
    """Train on images whose contrasts differ by factors of twenty."""
    model = DigitsViT(dim=32, depth=2)
    return images(model, functools.partial(AdamW, lr=2e-3), batch=8, change=contrasts, for_test=contrasts)


def positions_training() -> Training:
    """Train a vision transformer as it is."""
    return images(DigitsViT(dim=32, depth=3), functools.partial(AdamW, lr=2e-3))


def largest_measured(training: Training, monitor: StabilityMonitor) -> float:
    """The largest value that the case has measured."""
    return max(training.measured)


def nothing_measured(training: Training, monitor: StabilityMonitor | None) -> float:
    """No statistic shows it."""
    return math.nan


def norms_training() -> Training:
    """Train a convolutional net as it is."""
    return images(conv_net(), functools.partial(AdamW, lr=1e-2))


def group_norm(channels: int) -> nn.Module:
    """Eight groups, and the gain and bias of each channel."""
    return nn.GroupNorm(8, channels)


CASES = {
    "logits": Case(
        logits_training, 120, "attention_logit_max", "`attention_logit_max`", largest_logit, 100.0,
        {
            "sigma_reparametrize": on_model(sigma_reparametrize), "qk_norm": on_model(qk_norm),
            "qk_clip": clip_queries_and_keys,
        },
    ),
    "depth": Case(
        depth_training, 120, "depth_growth_rate", "`depth_growth_rate`", growth_over_depth, None,
        {
            "scale_by_depth": on_model(scale_by_depth),
            "scale_residuals 1/sqrt(n)": on_model(lambda m: scale_residuals(m, EXAMPLE, scale="1/sqrt(n)")),
            "scale_residuals 1/n": on_model(lambda m: scale_residuals(m, EXAMPLE, scale="1/n")),
            "scale_residuals skipinit": on_model(lambda m: scale_residuals(m, EXAMPLE, scale="skipinit")),
            "peri_norm": on_model(lambda m: peri_norm(m, EXAMPLE)),
            "mix_norm": on_model(mix_norm),
        },
    ),
    "embedding": Case(
        embedding_training, 120, "embedding_gradient_ratio", "`embedding_gradient_ratio`",
        largest_embedding_gradient, 10.0,
        {"stable_embedding": on_model(stable_embedding), "freeze_embedding": on_model(freeze_embedding)},
    ),
    "channels": Case(
        channels_training, 120, "channel_spread", "largest over median range of the channels of a norm's output",
        largest_measured, 2.0, {"equalize_channels": equalize},
    ),
    "micro-batches": Case(
        micro_batch_training, 400, "var_fluctuation", "`var_fluctuation` of norms that read the batch",
        batch_fluctuation, None,
        {
            "GroupNorm": other_norms(group_norm, standardized=False),
            "standardize_weights, GroupNorm": other_norms(group_norm, standardized=True),
            "standardize_weights, BatchChannelNorm": other_norms(
                lambda channels: BatchChannelNorm(channels, groups=8), standardized=True
            ),
            "EvoNormS0": other_norms(lambda channels: EvoNormS0(channels, groups=8), False, activated=True),
        },
    ),
    "evaluation": Case(
        eval_training, 120, "var_discrepancy", "`var_discrepancy`", discrepancy, 0.5,
        {
            "recalibrate_norms": recalibrated(), "recalibrate_norms kappa=0": recalibrated(kappa=0.0),
            "recalibrate_norms kappa=1": recalibrated(kappa=1.0),
        },
    ),
    "shift": Case(
        shift_training, 120, "var_discrepancy", "`var_discrepancy` on the shifted data", discrepancy, 0.5,
        {
            "recalibrate_norms alpha=0.5": recalibrated(on_test=True, alpha=0.5),
            "recalibrate_norms alpha=1": recalibrated(on_test=True),
        },
    ),
    "stream": Case(
        stream_training, 120, "var_discrepancy", "-", nothing_measured, None,
        {"statistics of the batch": use_batch_statistics, "unmix_norms": unmix},
    ),
    "spikes": Case(
        spikes_training, 150, "gradient_spike", "`update_ratio` at the worst step", largest_update, 0.05,
        {"AdaptiveClip": clip_gradients, "GradientNoise eta=0.01": noisy_gradients(0.01)},
    ),
    "start": Case(
        start_training, 400, "", "-", nothing_measured, None,
        {"GradientNoise eta=0.01": noisy_gradients(0.01), "GradientNoise eta=0.3": noisy_gradients(0.3)},
    ),
    "length": Case(
        length_training, 500, "effective_learning_rate", "`effective_learning_rate`, the first over the last",
        lost_learning_rate, 2.0, {"WeightProjection": keep_lengths},
    ),
    "patches": Case(
        patches_training, 200, "", "-", nothing_measured, None, {"dual_patch_norm": on_model(dual_patch_norm)},
    ),
    "positions": Case(
        positions_training, 200, "", "-", nothing_measured, None, {"lape": on_model(lape)},
    ),
    "norms alone": Case(
        norms_training, 200, "", "-", nothing_measured, None, {"train_only_norms": on_model(train_only_norms)},
    ),
}  # fmt: skip
