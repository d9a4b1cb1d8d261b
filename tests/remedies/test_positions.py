"""`lape`: blocks add positions with norms of their own, as written by hand, and they are constants after the fold."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stabnorm import StabNormError, convert_norms, find_norms, fold_gains, fold_norms
from stabnorm.nn.layer_positions import AddsPositions
from stabnorm.remedies import lape
from tests.remedies import family
from tests.remedies.family import Block, check_compiled, largest, train

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))


class ViT(nn.Module):
    """Tokens with learnable positions, and pre-norm blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.pos_embed = nn.Linear(8, 8), nn.Parameter(torch.randn(1, 5, 8))
        self.blocks = nn.ModuleList(Block(8, 2) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def vit() -> Any:
    torch.manual_seed(0)
    return ViT()


def with_lape(model: Any) -> Any:
    return lape(model)


def test_what_holds_for_every_remedy() -> None:
    family.check_outputs(vit, X, with_lape)
    family.check_undo(vit, with_lape)
    family.check_loading(vit, X, with_lape)
    family.check_copies(vit, X, with_lape)
    family.check_autocast(vit, X, with_lape)
    family.check_checkpointed(vit, X, with_lape)


@pytest.mark.slow
def test_a_compiled_model_is_one_graph() -> None:
    check_compiled(vit, X, with_lape)


def test_it_equals_the_blocks_written_by_hand() -> None:
    model, plain = vit().eval(), vit().eval()
    report = lape(model)
    assert report.changed == ["blocks.0.norm1", "blocks.1.norm1", "blocks.2.norm1", "pos_embed"]
    with torch.no_grad():
        for block in model.blocks:
            nn.init.normal_(block.norm1.position_norm.weight)
            nn.init.normal_(block.norm1.position_norm.bias)
    x, p = plain.embed(X), plain.pos_embed
    for block, changed in zip(plain.blocks, model.blocks, strict=True):
        own = changed.norm1.position_norm
        p = F.layer_norm(p, (8,), own.weight, own.bias)
        h = block.norm1(x) + p
        q, k, v = (m(h).unflatten(-1, (2, -1)).transpose(1, 2) for m in (block.q_proj, block.k_proj, block.v_proj))
        x = x + block.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + block.fc2(F.gelu(block.fc1(block.norm2(x))))
    assert largest(model(X), plain.head(plain.norm(x))) < 1e-5


def test_the_positions_are_constants_after_the_fold_and_their_norms_are_gone() -> None:
    """methods.md section 4, LaPE: exact; a norm before an addition is folded rightly or kept, never wrongly."""
    model = vit().double()
    lape(model)
    convert_norms(model, to="repbn")
    train(model, X.double(), steps=4)
    model.eval()
    result = fold_norms(model, X.double())
    assert largest(result.model(X.double()), model(X.double())) < 1e-12
    assert not any(isinstance(module, AddsPositions) for module in result.model.modules())
    kept = [norm.name for norm in result.norms if norm.status == "kept"]
    assert kept == [f"blocks.{i}.norm1" for i in range(3)]
    assert find_norms(result.model)[0].kind == "layer"
    assert "blocks.2.norm1.position_constant" in result.model.state_dict()


def test_the_monitor_still_sees_the_norms_and_a_fold_of_gains_is_right() -> None:
    model = vit().eval()
    lape(model)
    assert [layer.name for layer in find_norms(model) if layer.name.endswith("norm1")] == [
        f"blocks.{i}.norm1" for i in range(3)
    ]
    with torch.no_grad():
        for block in model.blocks:
            nn.init.normal_(block.norm1.weight)
    assert largest(fold_gains(model, X).model(X), model(X)) < 1e-5


def test_positions_that_are_not_clear_are_asked_for() -> None:
    model = vit()
    model.other_pos = nn.Parameter(torch.randn(1, 5, 8))
    with pytest.raises(StabNormError, match=r"pos_embed, other_pos. Name the parameter with positions="):
        lape(model)
    with pytest.raises(StabNormError, match=r"no parameter 'nothing.pos'"):
        lape(model, positions="nothing.pos")
    lape(model, positions="pos_embed")
    with pytest.raises(StabNormError, match="a remedy has changed it already"):
        lape(model, positions="pos_embed")
