"""Small trainings, and faults that break them from some step on, for `benchmarks.early_warning`.

Three families: a vision transformer on handwritten digits with Pre-LN and with Post-LN, and a character model with
RMSNorm. A fault is a function that is called before every step from its beginning on; it changes the training in place.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pydoc_data.topics import topics
from typing import Any, Literal, NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from stabnorm.examples.characters import ALPHABET, encode
from stabnorm.examples.digits import Attention, augment

LEARNING_RATE, WARM_UP = 1e-3, 100
Dtype = Literal["float32", "autocast", "bfloat16"]


class Family(NamedTuple):
    """What is trained."""

    data: Literal["digits", "characters"]
    width: int
    batch: int
    norm: Callable[[int], nn.Module]
    post: bool = False  # whether the norms follow the branches, instead of preceding them
    clip: float = math.inf


FAMILIES = {
    "digits Pre-LN": Family("digits", 48, 32, nn.LayerNorm),
    "digits Post-LN": Family("digits", 48, 32, nn.LayerNorm, post=True),
    "characters": Family("characters", 64, 8, nn.RMSNorm, clip=1.0),
}
CLASSES, TOKENS = {"digits": 10, "characters": len(ALPHABET)}, {"digits": 16, "characters": 48}


def depth_factor(depth: int) -> float:
    """Return by how much the branches begin smaller, and steps are shorter, without which deep models do not learn."""
    return min(1.0, math.sqrt(4 / depth))


class Block(nn.Module):
    """A transformer block, Pre-LN or Post-LN."""

    def __init__(self, family: Family, dropout: float) -> None:
        super().__init__()
        width = family.width
        self.post, self.dropout = family.post, nn.Dropout(dropout)
        self.norm1, self.norm2 = family.norm(width), family.norm(width)
        self.attn = Attention(width, 4, causal=family.data == "characters")
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.disturb: Callable[[Tensor], Tensor] | None = None  # what a fault does to the input

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, tokens, width] to the same shape."""
        x = x if self.disturb is None else self.disturb(x)
        for norm, branch in ((self.norm1, self.attn), (self.norm2, self.mlp)):
            x = norm(x + self.dropout(branch(x))) if self.post else x + self.dropout(branch(norm(x)))
        return x


class Model(nn.Module):
    """A transformer that reads patches of digits or characters, with one norm beside those of its blocks."""

    def __init__(self, family: Family, depth: int, dropout: float) -> None:
        super().__init__()
        width, self.post, self.pooled = family.width, family.post, family.data == "digits"
        self.embed = nn.Conv2d(1, width, 2, stride=2) if self.pooled else nn.Embedding(len(ALPHABET), width)
        self.positions = nn.Parameter(0.5 * torch.randn(TOKENS[family.data], width))
        blocks = nn.ModuleList(Block(family, dropout) for _ in range(depth))
        with torch.no_grad():  # as GPT-2 begins; four blocks are left as they are
            for block in blocks.children():
                for last in ("attn.proj.weight", "mlp.2.weight"):
                    block.get_parameter(last).mul_(depth_factor(depth))
        norm = family.norm(width)  # of the embedding in Post-LN, else before the head
        for name, module in [("norm", norm), ("blocks", blocks)][:: 1 if self.post else -1]:
            self.add_module(name, module)
        self.head = nn.Linear(width, CLASSES[family.data])
        self.gain = 1.0  # of the input

    def forward(self, x: Tensor) -> Tensor:
        """Map images [batch, 1, 8, 8] or characters [batch, tokens] to logits."""
        x = self.embed(self.gain * x).flatten(2).transpose(1, 2) if self.pooled else self.gain * self.embed(x)
        x = x + self.positions
        norm = self.get_submodule("norm")
        x = norm(x) if self.post else x
        for block in self.get_submodule("blocks").children():
            x = block(x)
        x = x if self.post else norm(x)
        logits: Tensor = self.head(x.mean(1) if self.pooled else x)
        return logits


Schedule = Callable[[int], float]
"""The factor of the learning rate at a step."""


def warmed_up(after: Schedule, steps: int = WARM_UP) -> Schedule:
    """Return a schedule that rises along a line over some steps, and is `after` from there on."""
    return lambda step: min(1.0, (step + 1) / steps) * after(step)


def constant(step: int) -> float:
    """Return 1."""
    return 1.0


def cosine(step: int, period: int) -> float:
    """Fall from 1 to 0.02 over a period, and start again."""
    return 0.02 + 0.49 * (1 + math.cos(math.pi * (step % period) / period))


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Return all images and their digits."""
    data = load_digits()
    return torch.from_numpy(data.images).float().div(8).sub(1).unsqueeze(1), torch.from_numpy(data.target)


@cache
def text() -> Tensor:
    """Return the characters of Python's documentation."""
    return encode("\n".join(topics[name] for name in sorted(topics)))


class Training:
    """A training in progress: model, optimizer, batches and schedule.

    Args:
        family: what is trained.
        seed: of weights, batches and dropout.
        depth: number of blocks.
        dropout: of the branches.
        schedule: the factor of the learning rate at a step.
        dtype: "autocast" computes forwards in bfloat16, and "bfloat16" has the weights and moments in it, too.
    """

    def __init__(
        self, family: Family, seed: int, *, depth: int = 4, dropout: float = 0.0, schedule: Schedule = constant,
        dtype: Dtype = "float32",
    ) -> None:  # fmt: skip
        torch.manual_seed(seed)
        self.family, self.depth, self.schedule, self.dtype = family, depth, schedule, dtype
        self.model = Model(family, depth, dropout).to(torch.bfloat16 if dtype == "bfloat16" else torch.float32)
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True)
        self.step, self.lr_factor = 0, 1.0
        self.random_labels = False
        self.guilty = min(1 + seed % max(1, depth - 2), depth - 1)  # the block that a fault breaks

    @property
    def block(self) -> Block:
        """The block that a fault breaks."""
        return self.blocks[self.guilty]

    @property
    def blocks(self) -> list[Block]:
        """All blocks."""
        return [block for block in self.model.modules() if isinstance(block, Block)]

    def batch(self) -> tuple[Tensor, Tensor]:
        """Draw the next inputs and targets."""
        count = self.family.batch
        if self.family.data == "digits":
            images, targets = digits()
            rows = torch.randint(len(images), (count,))
            inputs, targets = augment(images[rows]), targets[rows]
        else:
            length = TOKENS["characters"]
            starts = torch.randint(len(text()) - length - 1, (count, 1))
            windows = text()[starts + torch.arange(length + 1)]
            inputs, targets = windows[:, :-1], windows[:, 1:]
        return inputs, torch.randint_like(targets, CLASSES[self.family.data]) if self.random_labels else targets

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean cross-entropy, in nats."""
        inputs, targets = batch
        if inputs.is_floating_point():
            inputs = inputs.to(self.model.positions.dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "autocast"):
            logits = self.model(inputs)
        return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten())

    def train_step(self) -> tuple[Tensor, Tensor, Callable[[], Tensor]]:
        """Do one step, and return the loss, the norm of the gradient before clipping, and the loss as a function."""
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * depth_factor(self.depth) * self.lr_factor * self.schedule(self.step)
        batch = self.batch()
        self.optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.family.clip)
        self.optimizer.step()
        self.step += 1
        return loss.detach(), norm, lambda: self.loss(batch)

    def expected(self, fault: "Fault") -> set[str]:
        """Return the names of the norms and modules that a fault of one place may rightly be named after."""
        if fault.where == "input":
            return {"norm", "embed", "positions"} if self.family.post else {"blocks.0.norm1", "embed", "positions"}
        behind = "norm" if self.guilty + 1 == self.depth and not self.family.post else f"blocks.{self.guilty + 1}.norm1"
        return {f"blocks.{self.guilty}", behind}

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next step depends on."""
        return copy.deepcopy({
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step,
            "random": torch.get_rng_state(),
        })  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        state = copy.deepcopy(state)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        torch.set_rng_state(state["random"])


# -- faults ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    Attributes:
        apply: called before each step, with the training and the number of steps since the fault began.
        gradual: whether it grows over many steps; else it is there at once.
        where: "block" (one block is broken), "input" (what enters the model) or "everywhere".
    """

    apply: Callable[[Training, int], None]
    gradual: bool
    where: Literal["block", "input", "everywhere"]


def _faster(rate: float, ramp: bool = False) -> Callable[[Training, int], None]:
    def apply(training: Training, since: int) -> None:
        training.lr_factor = rate ** (since + 1) if ramp else rate

    return apply


@torch.no_grad()
def _grow(parameters: list[Tensor], factor: float) -> None:
    for parameter in parameters:
        parameter.mul_(factor)


def _gain(factor: float) -> Callable[[Training, int], None]:
    return lambda training, since: _grow([training.block.norm1.get_parameter("weight")], factor)


def _second_linear(factor: float) -> Callable[[Training, int], None]:
    return lambda training, since: _grow([training.block.mlp.get_parameter("2.weight")], factor)


def _queries_and_keys(training: Training, since: int) -> None:
    width = training.family.width
    _grow([training.block.attn.qkv.weight[: 2 * width]], 1.01)


def _bad_batch(training: Training, since: int) -> None:
    training.model.gain = 50.0 if since == 0 else 1.0


def _drift(training: Training, since: int) -> None:
    training.model.gain = 1.01 ** (since + 1)


def _overflow(training: Training, since: int) -> None:
    """Grow the second linear map, and let what is far beyond the usual be infinite, as in float16."""
    if since == 0:
        with torch.no_grad():
            sizes = list[Tensor]()
            state = torch.get_rng_state()
            hooks = [
                block.register_forward_hook(lambda m, a, out: sizes.append(out.abs().max()))
                for block in training.blocks
            ]
            training.loss(training.batch())
            for hook in hooks:
                hook.remove()
            torch.set_rng_state(state)
        limit = 16 * float(torch.stack(sizes).max())
        for block in training.blocks:
            block.disturb = lambda x: torch.where(x.abs() > limit, torch.inf, x)
    _second_linear(1.03)(training, since)


def _infinity(training: Training, since: int) -> None:
    def set_one(x: Tensor) -> Tensor:
        x = x.clone()
        x[0, 0, 0] = torch.inf
        return x

    training.block.disturb = set_one if since == 0 else None


@torch.no_grad()
def _stale_moments(training: Training, since: int) -> None:
    if since == 0:
        for parameter in training.block.parameters():
            training.optimizer.state[parameter]["exp_avg_sq"].mul_(1e-4)


def _labels(training: Training, since: int) -> None:
    training.random_labels = since < 40


def _nothing(training: Training, since: int) -> None:
    del training, since


FAULTS = {
    "learning rate x1.03 a step": Fault(_faster(1.03, ramp=True), True, "everywhere"),
    "input x1.01 a step": Fault(_drift, True, "input"),
    "gain x1.02 a step": Fault(_gain(1.02), True, "block"),
    "fc2 x1.02 a step": Fault(_second_linear(1.02), True, "block"),
    "q, k x1.01 a step": Fault(_queries_and_keys, True, "block"),
    "fc2 x1.03 a step, overflow": Fault(_overflow, True, "block"),
    "gain x0.97 a step": Fault(_gain(0.97), True, "block"),
    "learning rate x4": Fault(_faster(4), False, "everywhere"),
    "learning rate x10": Fault(_faster(10), False, "everywhere"),
    "learning rate x100": Fault(_faster(100), False, "everywhere"),
    "one batch x50": Fault(_bad_batch, False, "input"),
    "one infinity": Fault(_infinity, False, "block"),
    "second moments x1e-4": Fault(_stale_moments, False, "block"),
    "40 steps of random labels": Fault(_labels, False, "everywhere"),
    "nothing": Fault(_nothing, True, "everywhere"),
}
CALM = {
    "constant": (warmed_up(constant), 0.0),
    "long warm-up, cosine, dropout": (warmed_up(lambda step: cosine(step, 3000), 300), 0.1),
    "step decay, dropout": (warmed_up(lambda step: 1.0 if step < 1500 else 0.1), 0.1),
    "restarts": (warmed_up(lambda step: cosine(step, 1000)), 0.0),
}
