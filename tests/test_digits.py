import math
from itertools import product
from statistics import fmean

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from pytorch_lightning.utilities.types import STEP_OUTPUT
from torch import Tensor

from stabnorm.examples.digits import BLANK, Batch, Destabilize, DigitsViT, augment, digits_loaders

pytestmark = pytest.mark.slow


class Losses(Callback):
    """Keeps the training loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        self.values.append(trainer.callback_metrics["train/loss"].item())


def train(steps: int, *callbacks: Callback, accumulate: int = 1) -> tuple[DigitsViT, list[float]]:
    """A seeded run of a small model, without the parts of a trainer that only slow a test down."""
    seed_everything(0, verbose=False)
    model, losses = DigitsViT(depth=2, lr=1e-2, warmup_steps=10), Losses()
    trainer = Trainer(
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        accelerator="cpu",
        callbacks=[losses, *callbacks],
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, *digits_loaders())
    return model, losses.values


def parameters(model: DigitsViT) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_loaders_serve_every_real_image_once() -> None:
    train_loader, test_loader = digits_loaders(batch_size=50)
    parts = [torch.cat([images for images, _ in loader]) for loader in (train_loader, test_loader)]
    assert [part.shape for part in parts] == [(1000, 1, 8, 8), (797, 1, 8, 8)]

    images = torch.cat(parts)
    assert (images.min().item(), images.max().item()) == (BLANK, 1.0)
    assert len({image.numpy().tobytes() for image in images}) == 1797  # no two are alike, so none came twice


def test_split_stays_while_order_follows_the_seed() -> None:
    def first_batches(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [next(iter(loader))[0] for loader in digits_loaders()]

    (train_0, test_0), (train_again, _), (train_1, test_1) = map(first_batches, (0, 0, 1))
    assert torch.equal(train_0, train_again)
    assert not torch.equal(train_0, train_1)
    assert torch.equal(test_0, test_1)


def test_augment_moves_the_whole_digit() -> None:
    image = torch.full((1, 1, 8, 8), BLANK)
    image[..., 3:5, 3:5] = 1.0
    moved = augment(image.expand(200, -1, -1, -1), shift=1, noise=0.0)

    assert moved.shape == (200, 1, 8, 8)
    assert torch.equal(moved.sum(dim=(1, 2, 3)), image.sum().expand(200))  # nothing of it falls off the edge
    corners = {tuple(ink.nonzero()[0].tolist()) for ink in moved[:, 0] > 0}
    assert corners == set(product((2, 3, 4), repeat=2))


def test_model_learns_within_40_steps() -> None:
    _, losses = train(40)
    guessing = math.log(10)
    assert losses[0] == pytest.approx(guessing, abs=0.3)
    assert fmean(losses[-5:]) < guessing - 0.25


def test_runs_are_reproducible() -> None:
    (first, first_losses), (second, second_losses) = train(3), train(3)
    assert first_losses == second_losses
    torch.testing.assert_close(parameters(first), parameters(second), rtol=0, atol=0)


def test_fault_leaves_every_bit_alone_until_it_starts() -> None:
    healthy, healthy_losses = train(5)
    untouched, losses = train(5, Destabilize("blocks.1", start=5, growth=1.5))
    assert losses == healthy_losses
    torch.testing.assert_close(parameters(untouched), parameters(healthy), rtol=0, atol=0)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_fault_grows_the_weights_of_its_target_at_every_step_from_start(accumulate: int) -> None:
    healthy, _ = train(4, accumulate=accumulate)
    faulty, _ = train(4, Destabilize("blocks.1", start=3, growth=1.5), accumulate=accumulate)
    before, after = parameters(healthy), parameters(faulty)

    grown = {name for name in before if not torch.equal(before[name], after[name])}
    assert grown == {name for name in before if name.startswith("blocks.1.") and before[name].ndim > 1}
    ratios = [after[name].norm() / before[name].norm() for name in grown]
    torch.testing.assert_close(torch.stack(ratios), torch.full((len(ratios),), 1.5), rtol=1e-2, atol=0)
