"""`mix_norm`: the first blocks are post-norm, as written by hand, and the others stay as they are."""

from typing import Any

import pytest
import torch
from torch import nn

from stabnorm import StabNormError
from stabnorm.remedies import mix_norm
from tests.remedies.family import check_copies, check_outputs, check_undo, largest, net


def encoder(depth: int = 8) -> Any:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, depth, nn.LayerNorm(8), enable_nested_tensor=False)


def test_the_first_quarter_is_post_norm_and_equals_blocks_written_by_hand() -> None:
    """methods.md 3.6: the sequence of layer types, and equality with hand-written blocks."""
    model, x = encoder().eval(), torch.randn(2, 5, 8)
    report = mix_norm(model)
    assert [layer.norm_first for layer in model.layers] == [False] * 2 + [True] * 6
    assert report.left["layers.2"] == "it is behind the first 0.25 of the blocks"
    y = x
    for number, layer in enumerate(model.layers):
        if number < 2:
            y = layer.norm1(y + layer.self_attn(y, y, y)[0])
            y = layer.norm2(y + layer.linear2(layer.linear1(y).relu()))
        else:
            h = layer.norm1(y)
            y = y + layer.self_attn(h, h, h)[0]
            y = y + layer.linear2(layer.linear1(layer.norm2(y)).relu())
    assert largest(model(x), model.norm(y)) < 1e-5


def test_what_holds_for_every_remedy() -> None:
    x = torch.randn(2, 5, 8)
    check_outputs(encoder, x, mix_norm)
    check_copies(encoder, x, mix_norm)
    check_undo(encoder, mix_norm)


def test_blocks_without_the_flag_and_a_wrong_share_are_refused() -> None:
    with pytest.raises(StabNormError, match="It needs repeated blocks with one of the flags norm_first"):
        mix_norm(net())
    with pytest.raises(ValueError, match="share"):
        mix_norm(encoder(), share=1.5)
    model = encoder()
    mix_norm(model)
    with pytest.raises(StabNormError, match="it is post-norm already"):
        mix_norm(model, include=r"layers\.0")
