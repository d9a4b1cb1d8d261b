"""torch's BatchNorm: the same engine, by exact type, where eval is a fixed affine map."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stabnorm import fold_norms
from tests.fold.nets import draw, error_of, net, ready


class Bottleneck(nn.Module):
    """ResNet's, with its in-place additions and activations."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, stride, padding=1, groups=2, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.conv3, self.bn3 = nn.Conv2d(4, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width)
        self.down = nn.Sequential(nn.Conv2d(width, 2 * width, 1, stride, bias=False), nn.BatchNorm2d(2 * width))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += self.down(x)
        out: Tensor = self.relu(y)
        return out


def resnet() -> nn.Module:
    stem = nn.Sequential(nn.Conv2d(3, 4, 7, 2, padding=3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    return nn.Sequential(stem, nn.MaxPool2d(2), Bottleneck(4, 1), Bottleneck(8, 2), head)


def preactivation() -> nn.Module:
    """Norm and activation before the convolution: nothing to fold into on either side."""
    return nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "resnet": (resnet, (2, 3, 24, 20), "backward"),
    "one dimension": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU()), (2, 3, 9), "backward"),
    "three dimensions": (
        lambda: nn.Sequential(nn.Conv3d(3, 4, 2), nn.BatchNorm3d(4), nn.ReLU()), (2, 3, 4, 5, 6), "backward"
    ),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU()), (2, 3, 5, 4), "backward"
    ),
    "linear": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()), (6, 3), "backward"),
    "without gain and bias": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False), nn.ReLU()), (2, 3, 5, 4), "backward"
    ),
    "before the linear": (lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4)), (6, 3), "forward"),
    "synchronised": (lambda: nn.Sequential(nn.Linear(3, 4), nn.SyncBatchNorm(4), nn.ReLU()), (6, 3), "backward"),
    "pre-activation": (preactivation, (2, 3, 5, 4), "affine"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_batch_norms_fold_exactly(name: str) -> None:
    build, shape, status = MODELS[name]
    model = ready(build())
    norms = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    result = fold_norms(model, draw(*shape))
    assert [norm.status for norm in result.norms] == [status] * norms, str(result)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in result.model.modules())
    assert error_of(result.model, model, [(2 * draw(*shape, seed=1) + 1,)]) < 1e-12


def test_channels_that_are_tokens_are_no_linear_s_features() -> None:
    """[batch, tokens, features] with as many tokens as features: torch's own fusion scales the wrong axis here."""
    model = ready(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)))
    result = fold_norms(model, draw(5, 4, 4))
    assert [norm.status for norm in result.norms] == ["affine"]
    assert error_of(result.model, model, [(draw(2, 4, 4, seed=1),)]) < 1e-12


class NormAndActivation(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: a subclass that does more."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input))


def test_a_subclass_keeps_what_its_forward_does_after_the_norm() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), NormAndActivation(4), nn.Conv2d(4, 2, 1)).double()
    for _ in range(3):
        model(1 + 2 * draw(4, 3, 5, 4))
    model.eval()
    result = fold_norms(model, draw(2, 3, 5, 4))
    assert [(norm.name, norm.status) for norm in result.norms] == [("1", "backward")]
    assert error_of(result.model, model, [(draw(2, 3, 5, 4, seed=1),)]) < 1e-12


class Standardize(nn.Module):
    """A user's own affine norm, over any axis."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.randn(channels))
        self.register_buffer("std", torch.rand(channels) + 0.5)

    def forward(self, x: Tensor, verbose: bool = False) -> Tensor:
        y: Tensor = (x - self.get_buffer("mean")) / self.get_buffer("std")
        return y

    def fold_affine(self) -> tuple[Tensor, Tensor, int]:
        return 1 / self.get_buffer("std"), -self.get_buffer("mean") / self.get_buffer("std"), -1


def test_a_module_of_the_user_s_folds_by_what_it_says_of_itself() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        return m.fc(m.norm(x, verbose=True))

    model = ready(net(forward, norm=Standardize(6), fc=nn.Linear(6, 5))())
    result = fold_norms(model, draw(3, 6))
    assert [norm.status for norm in result.norms] == ["forward"]
    assert error_of(result.model, model, [(draw(3, 6, seed=1),)]) < 1e-12
