"""Which example the folding callback runs the model on: rows of the first batch, the whole of it, or what is given."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from stabnorm.callbacks import FoldCallback
from tests.callbacks.test_fold import loaded
from tests.lightning_small import trainer


class Classifier(pytorch_lightning.LightningModule):
    """With a forward of its own and BatchNorm; notes how many rows it is called with, in evaluation."""

    def __init__(self, as_batch: Callable[[Tensor, Tensor], Any], at_least: int = 1) -> None:
        super().__init__()
        self.as_batch, self.at_least = as_batch, at_least
        self.body = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(0.5), nn.Linear(7, 2))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        if not self.training:
            ROWS_SEEN.append(len(x))
        assert len(x) >= self.at_least
        y: Tensor = self.body(scale * x)
        return y

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch if isinstance(batch, Tensor) else batch["x"] if isinstance(batch, dict) else batch[0]
        loss: Tensor = self(x).square().mean()
        return loss

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        data = TensorDataset(torch.randn(18, 5, generator=generator), torch.randn(18, generator=generator))
        return DataLoader(
            data, batch_size=9, collate_fn=lambda rows: self.as_batch(*map(torch.stack, zip(*rows, strict=True)))
        )

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


ROWS_SEEN: list[int] = []


def fit_classifier(tmp_path: Path, callback: FoldCallback, model: Classifier) -> None:
    ROWS_SEEN.clear()
    run = trainer(tmp_path, callback)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(pytorch_)?lightning.*")
        run.fit(model)


@pytest.mark.parametrize(
    ("as_batch", "example"),
    [
        (lambda x, y: x, None),
        (lambda x, y: (x, y), None),
        (lambda x, y: [x, y], None),
        (lambda x, y: {"x": x, "scale": torch.tensor(0.5)}, None),
        (lambda x, y: {"x": x, "y": y}, lambda batch: batch["x"]),
        (lambda x, y: {"x": x, "y": y}, lambda batch: {"x": batch["x"], "scale": 0.5}),
        (lambda x, y: {"x": x, "y": y}, torch.randn(2, 5)),
        (lambda x, y: {"x": x, "y": y}, [torch.randn(2, 5), ((torch.randn(3, 5),), {"scale": 2.0})]),
    ],
)
def test_an_example_comes_from_the_first_training_batch_or_is_given(
    tmp_path: Path, as_batch: Callable[[Tensor, Tensor], Any], example: Any
) -> None:
    callback, model = FoldCallback(example=example), Classifier(as_batch)
    fit_classifier(tmp_path, callback, model)
    assert callback.result is not None
    assert [(norm.name, norm.status) for norm in callback.result.norms] == [("body.1", "forward")]
    folded = loaded(callback.directory, Classifier(as_batch))
    x = torch.randn(4, 5)
    torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    if example is None and not isinstance(as_batch(x, x), dict):
        assert set(ROWS_SEEN) <= {4, 5, 1}  # a few rows will do, and another number for the check


def test_the_whole_batch_is_taken_where_a_few_rows_do_not_run(tmp_path: Path) -> None:
    callback = FoldCallback()
    fit_classifier(tmp_path, callback, Classifier(lambda x, y: (x, y), at_least=5))
    assert callback.result is not None
    assert set(ROWS_SEEN) <= {4, 9, 10, 1}
