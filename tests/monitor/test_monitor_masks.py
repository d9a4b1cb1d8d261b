"""Padding never counts: masks that fit, masks of several lengths, masks that are refused."""

import pytest
import torch
from torch import nn

from stabnorm import StabilityMonitor, valid_tokens


def test_masks_leave_padding_out() -> None:
    model = nn.Sequential(nn.LayerNorm(8))
    x, mask = torch.randn(4, 6, 8), torch.rand(4, 6) < 0.5
    history = []
    for batch, active in ((torch.where(mask[..., None], x, 1e9), mask), (x[mask], None)):
        with StabilityMonitor(model, gradients=False) as monitor:
            if active is None:
                model(batch)
            else:
                with valid_tokens(active):
                    model(batch)
            monitor.step()
        history.append(monitor.history())
    for name in history[0]:
        torch.testing.assert_close(history[0][name], history[1][name], rtol=1e-6, atol=1e-7, equal_nan=True)


def test_a_mask_reaches_heads_and_flattened_tokens_and_leaves_others_alone() -> None:
    model = nn.ModuleDict({"heads": nn.LayerNorm(5), "flat": nn.LayerNorm(8), "pooled": nn.LayerNorm(8)})
    mask = torch.tensor([[True, True, False], [True, False, False]])
    with StabilityMonitor(model, ["amax"]) as monitor, valid_tokens(mask):
        model["heads"](torch.randn(2, 3, 4, 5))
        model["flat"](torch.randn(6, 8))
        model["pooled"](torch.randn(2, 8))
        monitor.step()
    assert monitor.history()["tokens"][0].tolist() == [12, 3, 2]


def test_a_mask_of_the_wrong_length_is_refused_with_the_layers_name() -> None:
    model = nn.Sequential(nn.Identity(), nn.LayerNorm(8))
    mask = torch.ones(2, 3, dtype=torch.bool)
    match = r"the mask has shape \(2, 3\), but the input of norm '1' has tokens of shape \(2, 4\).*class token"
    with StabilityMonitor(model), valid_tokens(mask), pytest.raises(ValueError, match=match):
        model(torch.randn(2, 4, 8))


def test_the_mask_that_fits_is_taken_of_several() -> None:
    model = nn.Sequential(nn.LayerNorm(8))
    source, target = torch.ones(2, 3, dtype=torch.bool), torch.tensor([[True] * 4, [False] * 4])
    with StabilityMonitor(model, ["amax"]) as monitor, valid_tokens(source, target):
        model(torch.randn(2, 4, 8))
        model(torch.randn(2, 3, 8))
        monitor.step()
    assert monitor.history()["tokens"].tolist() == [[10]]


def test_of_masks_that_fit_alike_the_innermost_context_counts_and_in_it_the_first() -> None:
    model = nn.Sequential(nn.LayerNorm(8))
    one, two, three = (torch.arange(4).expand(2, 4) < length for length in (1, 2, 3))
    with StabilityMonitor(model, ["amax"]) as monitor:
        for masks in ((one, two), (two, one)):
            with valid_tokens(three), valid_tokens(*masks):
                model(torch.randn(2, 4, 8))
            monitor.step()
        with valid_tokens(three):
            with valid_tokens(one):
                pass
            model(torch.randn(2, 4, 8))
        monitor.step()
        seen = monitor.history()["tokens"].flatten().tolist()
    assert seen == [2, 4, 6]


def test_a_mask_that_is_not_bool_is_refused() -> None:
    with pytest.raises(TypeError, match=r"is a bool tensor, True = valid; got torch\.int64\. Use mask\.bool"):
        valid_tokens(torch.ones(2, 3, dtype=torch.int64))


def test_masks_are_gone_after_an_exception() -> None:
    model = nn.Sequential(nn.LayerNorm(8))
    with pytest.raises(RuntimeError, match="boom"), valid_tokens(torch.ones(2, 3, dtype=torch.bool)):
        raise RuntimeError("boom")
    with StabilityMonitor(model):
        model(torch.randn(2, 4, 8))
