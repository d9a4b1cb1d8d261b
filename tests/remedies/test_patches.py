"""`dual_patch_norm`: LN, linear, LN over patches, as written by hand; both norms fold once they are switched."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stabnorm import StabNormError, convert_norms, fold_norms
from stabnorm.remedies import dual_patch_norm
from tests.remedies.family import check_compiled, in_the_family, largest, train

IMAGES = torch.randn(4, 3, 8, 12, generator=torch.Generator().manual_seed(1))


class ViT(nn.Module):
    """A patch embedding, a block without attention, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, 4, 4)
        self.positions = nn.Parameter(torch.randn(6, 8))
        self.norm, self.fc, self.head = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).mT + self.positions
        x = x + self.fc(self.norm(x))
        return self.head(x).mean(1)  # type: ignore[no-any-return]


def vit() -> Any:
    torch.manual_seed(0)
    return ViT()


@in_the_family
def test_dual_patch_norm(check: Callable[..., None]) -> None:
    """What holds for every remedy."""
    check(vit, IMAGES, dual_patch_norm)


@pytest.mark.slow
def test_a_compiled_model_is_one_graph() -> None:
    check_compiled(vit, IMAGES, dual_patch_norm)


def test_it_equals_the_layers_written_by_hand_and_without_norms_the_convolution() -> None:
    conv = vit().patch_embed
    model: Any = nn.Sequential(conv)
    images = torch.randn(2, 3, 9, 13)  # a convolution leaves out what is over
    before = conv(images)
    dual_patch_norm(model)
    patches = F.unfold(images, 4, stride=4).mT
    by_hand = F.layer_norm(F.linear(F.layer_norm(patches, (48,)), conv.weight.flatten(1), conv.bias), (8,))
    torch.testing.assert_close(model(images).flatten(2).mT, by_hand)
    conv.patch_norm, conv.output_norm = nn.Identity(), nn.Identity()
    torch.testing.assert_close(model(images), before)


@pytest.mark.parametrize("to", ["unified", "repbn"])
def test_both_switched_norms_fold_exactly(to: str) -> None:
    """methods.md section 4, Dual PatchNorm: the first folds forward, the second backward."""
    model = vit().double()
    dual_patch_norm(model)
    convert_norms(model, to=to)
    train(model, IMAGES.double(), steps=3)
    model.eval()
    result = fold_norms(model, IMAGES.double(), strict=True)
    status = {norm.name: norm.status for norm in result.norms}
    assert status["patch_embed.patch_norm"] == "forward"
    assert status["patch_embed.output_norm"] == "backward"
    assert largest(result.model(IMAGES.double()), model(IMAGES.double())) < 1e-12


def test_other_convolutions_are_no_patch_embedding() -> None:
    with pytest.raises(StabNormError, match=r"no patch embeddings. They are nn.Conv2d with a stride"):
        dual_patch_norm(nn.Sequential(nn.Conv2d(3, 8, 3, 1), nn.Conv2d(8, 8, 4, 4, padding=1), nn.Conv2d(8, 8, 1)))
    model = vit()
    dual_patch_norm(model)
    with pytest.raises(StabNormError, match="a norm of a remedy already"):
        dual_patch_norm(model)
    two = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 2, 2))
    assert dual_patch_norm(two).left == {"1": "it is not the first one"}
