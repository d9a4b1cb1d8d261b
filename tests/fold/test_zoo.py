"""The real packages, where they are installed (extra `zoo`), their norms switched: how many fold, and how exactly."""

import pytest
import torch
from torch import nn

from stabnorm import fold_norms
from stabnorm.nn import RepBN
from tests.convert.test_zoo import TIMM, TRANSFORMERS, built
from tests.families import randomize_
from tests.fold.nets import swapped

pytestmark = pytest.mark.filterwarnings("default")  # the packages' own warnings are theirs

# Norms that are left as one multiply-add: with a mean, and without one.
LEFT = {
    "swin, padded windows": (4, 0),
    "pvt v2": (3, 0),
    "mixer": (8, 8),  # token mixing contracts positions
    "distilbert": (1, 1),  # returned, as in the next three
    "albert": (1, 1),
    "t5": (1, 1),
    "whisper": (1, 1),
}


def calibrated(model: nn.Module, kwargs: dict[str, torch.Tensor], center: bool) -> nn.Module:
    """Everything drawn, statistics from data."""
    model = randomize_(swapped(model, center), seed=1).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.3)  # the look-alikes are narrower
            elif name.endswith("eta"):
                parameter.mul_(0.2)
        for module in model.modules():
            if isinstance(module, RepBN):
                module.reset_running_stats()
                module.momentum = None
            elif isinstance(module, nn.Dropout):
                module.p = 0.0
        model(**kwargs)
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("center", [True, False], ids=["with a mean", "scale only"])
@pytest.mark.parametrize(("package", "name"), [("timm", n) for n in TIMM] + [("transformers", n) for n in TRANSFORMERS])
def test_a_real_model_folds(package: str, name: str, center: bool) -> None:
    model, kwargs = built(package, name)
    result = fold_norms(calibrated(model, kwargs, center), kwargs)
    left = [norm for norm in result.norms if norm.status == "affine"]
    assert not [norm for norm in result.norms if norm.status == "kept"]
    assert len(left) == LEFT.get(name, (0, 0))[0 if center else 1], str(result)
    assert "rolled back" not in str(result)
    assert not result.vacuous
    assert result.max_rel_error < 1e-12
    assert center or not result.manifest["biases"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_an_encoder_s_last_norm_goes_when_only_the_logits_count(name: str) -> None:
    model, kwargs = built("transformers", name)
    result = fold_norms(calibrated(model, kwargs, True), kwargs, outputs=lambda output: output.logits)
    assert {norm.status for norm in result.norms} == {"forward"}
