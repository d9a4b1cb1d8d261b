"""The layer before a norm takes part in the fit: found where it may, and fitted as a regression in one go is."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stabnorm import convert_norms
from stabnorm.fit.feed import RIDGE, JointSums
from stabnorm.fit.graph import order_of
from stabnorm.fit.sums import ChannelSums, Seen
from stabnorm.fit.watch import seen_in
from stabnorm.norms import NormSearch
from stabnorm.pretrained import Affine, Runner, fit_norms, measure_norms
from tests.pretrained.nets import batches, converted_pair, post_norm


def feeders(model: nn.Module, x: object) -> dict[str, tuple[str, ...]]:
    chosen = order_of(model.eval(), NormSearch(model).found, x, Runner()).feeders
    return {name: feeder.names for name, feeder in chosen.items()}


def test_a_post_norm_model_has_them_everywhere() -> None:
    assert feeders(post_norm(), batches()[0]) == {
        "norm": ("words", "positions"),
        "norms.0": ("down.0",),
        "norms.1": ("down.1",),
    }


class Block(nn.Module):
    """One norm that reads a sum, and variations on who else reads what."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.linear, self.norm, self.out = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6)
        if kind == "weight shared":
            self.out.weight = self.linear.weight

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        branch: Tensor = self.linear(x.tanh())
        if self.kind == "called twice":
            branch = branch + self.linear(x)
        total: Tensor = 2 * branch + x if self.kind == "scaled" else x + branch
        y: Tensor = self.out(self.norm(total))
        if self.kind == "sum read":  # pre-norm: the stream goes on
            return y + total
        if self.kind == "branch read":
            return y + branch.sum()
        if self.kind == "sum returned":
            return y, total
        return y


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("plain", ("linear",)),
        ("sum read", None),
        ("branch read", None),
        ("sum returned", None),
        ("called twice", None),
        ("scaled", None),
        ("weight shared", None),
    ],
)
def test_a_layer_feeds_a_norm_only_where_nothing_else_reads_it(kind: str, expected: tuple[str, ...] | None) -> None:
    assert feeders(Block(kind), torch.randn(7, 6)).get("norm") == expected


def test_the_joint_fit_is_a_ridge_regression_in_one_go() -> None:
    torch.manual_seed(0)
    n, k, c = 700, 6, 3
    u, rest = torch.randn(n, k) + 2, torch.randn(n, c)
    x = rest + u @ torch.randn(k, c)
    y = (x / (1 + 0.5 * u[:, :1].square())) + 0.1 * torch.randn(n, c)
    sums, alone = JointSums(k, c), ChannelSums(c)
    for part in torch.arange(n).split(97):
        seen = Seen(x[part], y[part], None)
        sums.add(u[part], seen, y[part])
        alone.add(seen, y[part])
    solved = sums.solve(alone.affine())
    assert solved is not None
    fit, change = solved
    centred = u.double() - u.double().mean(0)
    ridge = RIDGE * centred.square().mean() * n
    for channel in range(c):  # the penalty is rows of the design
        xc, yc = ((t[:, channel].double() - t[:, channel].double().mean()) for t in (x, y))
        design = torch.cat(
            [
                torch.cat([xc[:, None], centred], 1),
                torch.cat([torch.zeros(k, 1), ridge.sqrt() * torch.eye(k)], 1).double(),
            ]
        )
        wanted = torch.cat([yc, torch.zeros(k).double()])
        (a, *v), *_ = np.linalg.lstsq(design.numpy(), wanted.numpy(), rcond=None)
        assert float(fit.scale[channel]) == pytest.approx(a, rel=1e-5)
        assert np.abs(change[channel].numpy() * a - v).max() < 1e-5
        new = x[:, channel].double() + u.double() @ change[channel]
        left = y[:, channel].double() - fit.scale[channel] * new - fit.shift[channel]
        assert abs(float(left.mean())) < 1e-5
        assert float(fit.mean[channel]) == pytest.approx(float(new.mean()), rel=1e-5)
        assert float(fit.square[channel]) == pytest.approx(float(new.var(correction=0)), rel=1e-4)
    assert fit.residual < alone.affine().residual


def test_padding_has_no_part_in_the_joint_fit() -> None:
    u, x, y = torch.randn(300, 4), torch.randn(300, 3), torch.randn(300, 3)
    valid = torch.rand(300) < 0.5
    padded, packed, alone = JointSums(4, 3), JointSums(4, 3), ChannelSums(3)
    padded.add(torch.where(valid[:, None], u, 1e6), Seen(x, y, valid), y)
    packed.add(u[valid], Seen(x[valid], y[valid], None), y[valid])
    alone.add(Seen(x, y, valid), y)
    solved, expected = padded.solve(alone.affine()), packed.solve(alone.affine())
    assert solved is not None
    assert expected is not None
    assert torch.equal(solved[1], expected[1])
    assert torch.equal(solved[0].scale, expected[0].scale)


def test_too_few_tokens_leave_the_layer_as_it_is() -> None:
    sums, alone = JointSums(6, 3), ChannelSums(3)
    x = torch.randn(20, 3)
    seen = Seen(x, 2 * x, None)
    sums.add(torch.randn(20, 6), seen, 2 * x)
    alone.add(seen, 2 * x)
    assert sums.solve(alone.affine()) is None


def test_the_layers_leave_less_than_the_norms_alone_and_on_other_data_too() -> None:
    lots = batches(24, 32)
    original, model, levels = converted_pair(post_norm(), lots)
    with_layers = copy.deepcopy(model)
    measure = measure_norms(original, NormSearch(original).found, lots, Runner())
    alone = fit_norms(model, original, lots, levels, Runner())
    together = fit_norms(with_layers, original, lots, levels, Runner(), measure.calls, measure.feeders)
    for name in alone:
        a, b = alone[name], together[name]
        assert isinstance(a, Affine)
        assert isinstance(b, Affine)
        assert b.residual < a.residual
    unseen = batches(4, seed=9)
    with torch.no_grad():
        errors = [
            sum(float((part(**batch) - original(**batch)).square().sum()) for batch in unseen)
            for part in (model, with_layers)
        ]
    assert errors[1] < 0.7 * errors[0]


def test_words_that_no_batch_has_become_what_the_norm_makes_of_them() -> None:
    model = post_norm()
    few = [{**batch, "input_ids": batch["input_ids"] % 20} for batch in batches(12, 32)]  # half of the vocabulary
    original, twin, _ = converted_pair(model, few)
    alone = copy.deepcopy(twin)
    measure = measure_norms(original, NormSearch(original).found, few, Runner())
    fit_norms(twin, original, few, [["norm"]], Runner(), measure.calls, measure.feeders)
    fit_norms(alone, original, few, [["norm"]], Runner())
    ids = torch.arange(20, 40)[:, None].expand(20, 5)

    def error(part: nn.Module) -> float:
        return float((_written(part, ids) - _written(original, ids)).square().mean())

    assert error(twin) < 0.2 * error(alone)


def _written(part: nn.Module, ids: Tensor) -> Tensor:
    layer = next(layer for layer in NormSearch(part).found if layer.name == "norm")
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return seen_in(part, [layer], batch, Runner())["norm"][0].written


def test_a_converted_model_of_another_kind_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv1d(3, 8, 1), nn.Flatten(), nn.LayerNorm(40), nn.Linear(40, 2)).eval()
    assert feeders(model, torch.randn(4, 3, 5)) == {}
    twin = copy.deepcopy(model)
    convert_norms(twin)
    fit_norms(twin, model, [torch.randn(64, 3, 5)], [["2"]], Runner(), {}, {})
    assert torch.equal(twin.state_dict()["0.weight"], model.state_dict()["0.weight"])
