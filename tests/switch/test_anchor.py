"""ScaleAnchor: the published loss, when its target is gathered, and what it prevents."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stabnorm.nn import PRepBN, TaperNorm
from stabnorm.switch import ScaleAnchor


def hidden(seed: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(5, 7, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_it_is_the_published_loss_about_the_mean_scale_while_lam_was_one(kind: Any) -> None:
    norm = TaperNorm(8, kind=kind).double()
    anchor = ScaleAnchor(norm, 0.3, momentum=0.25).double()

    def scales(x: Tensor) -> Tensor:
        square = x.var(-1, correction=0) if kind == "layer" else x.square().mean(-1)
        return (square + 1e-5).sqrt()

    average = filled = 0.0
    for seed in range(3):
        assert anchor(hidden(seed)) == 0
        average = 0.75 * average + 0.25 * float(scales(hidden(seed)).mean())
        filled = 0.75 * filled + 0.25
    torch.testing.assert_close(float(anchor.target), average / filled, rtol=1e-10, atol=0)
    norm.lam.fill_(0.9)
    x = hidden(7, 3.0).requires_grad_()
    want = 0.3 * (scales(x) - average / filled).square().mean()
    loss = anchor(x)
    torch.testing.assert_close(loss, want)
    (got,) = torch.autograd.grad(loss, x)
    (wanted,) = torch.autograd.grad(want, x)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(float(anchor.target), average / filled, rtol=1e-10, atol=0)  # it stays


def test_padding_and_a_batch_that_is_not_finite_do_not_enter_the_target() -> None:
    norm = PRepBN(8).double()
    padded, plain = (ScaleAnchor(norm).double() for _ in range(2))
    mask = torch.rand(5, 7) > 0.4
    x = hidden(0)
    padded(torch.where(mask[..., None], x, 1e9), mask)
    plain(x[mask])
    torch.testing.assert_close(padded.target, plain.target)
    plain(torch.full_like(x, torch.nan))
    torch.testing.assert_close(padded.target, plain.target)
    assert plain.skips == 1


def test_in_eval_mode_nothing_is_gathered_and_a_state_brings_the_target_back() -> None:
    norm = TaperNorm(8).double()
    anchor = ScaleAnchor(norm).double().eval()
    anchor(hidden(0))
    assert anchor.target.isnan()
    anchor.train()(hidden(0))
    again = ScaleAnchor(norm).double()
    again.load_state_dict(anchor.state_dict())
    assert torch.equal(again.target, anchor.target)
    assert not list(anchor.parameters())  # the norm is the model's


def test_without_the_last_norm_the_hidden_states_grow_and_with_the_anchor_they_do_not() -> None:
    """Cross-entropy falls with the size of the logits once the classes are told apart."""
    sizes = {}
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        body, norm, head = nn.Linear(6, 8), TaperNorm(8, kind="rms"), nn.Linear(8, 3, bias=False)
        anchor = ScaleAnchor(norm, weight)
        optimizer = torch.optim.SGD([*body.parameters(), *norm.parameters(), *head.parameters()], 0.5)
        x = torch.randn(90, 6)
        y = x[:, :3].argmax(1)
        for step in range(80):
            norm.lam.fill_(max(0.0, 1 - step / 20))
            h = body(x)
            loss = F.cross_entropy(head(norm(h)), y) + anchor(h)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        sizes[weight] = float(body(x).detach().square().mean().sqrt() / anchor.target)
    assert sizes[0.0] > 1.5
    assert 0.8 < sizes[1.0] < 1.25


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(TypeError, match="norm"):
        ScaleAnchor(nn.LayerNorm(8))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight=-1"):
        ScaleAnchor(TaperNorm(8), -1)
    with pytest.raises(ValueError, match="momentum=0"):
        ScaleAnchor(TaperNorm(8), momentum=0)
