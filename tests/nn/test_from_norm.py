"""A norm class says how it is made from a norm, measured and folded; convert, recalibrate and fold only ask it."""

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from stabnorm import convert_norms, find_norms, fold_norms, recalibrate_norms, register_norm
from stabnorm.errors import StabNormError
from stabnorm.nn import PowerNorm, PRepBN, RepBN, UnifiedNorm
from stabnorm.nn._base import TARGETS, EvalAffineNorm
from stabnorm.nn._channel_norm import ChannelNorm, running_values


class RangeNorm(ChannelNorm):
    """A norm that no file of the package knows: it divides by the running mean of the batch's largest squares."""

    running_square: Tensor

    def __init__(
        self, num_features: int, eps: float = 1e-5, *, power: float = 1.0, channel_dim: int = -1, sync: bool = False
    ) -> None:
        super().__init__(num_features, eps, channel_dim, sync)
        self.power = power
        self.weight = nn.Parameter(torch.empty(num_features))
        self.bias = nn.Parameter(torch.empty(num_features))
        self.register_buffer("running_square", torch.empty(num_features))
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        self.running_square.fill_(1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        rows, _ = self.rows_of(x, mask)
        square = rows.detach().square().amax(0) if self.training else self.running_square
        return self.like_input(self.eval_affine(rows, None, square, self.weight, self.bias, None), x)

    def running_statistics(self) -> tuple[Tensor, ...]:
        return (self.running_square,)

    def batch_statistics(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        rows, _ = self.rows_of(x, mask)
        return rows.square().amax(0)[None]


@pytest.fixture
def range_target() -> Iterator[str]:
    register_norm(RangeNorm, "batch", channel_dim="channel_dim")
    TARGETS["range"] = RangeNorm
    yield "range"
    del TARGETS["range"]


def test_a_new_norm_is_converted_to_measured_and_folded_by_what_it_says_of_itself(range_target: str) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    weight = model[1].weight
    assert convert_norms(model, range_target, power=2.0).norms[0].reason == "weight kept, bias kept"
    norm = model[1]
    assert isinstance(norm, RangeNorm)
    assert (norm.weight is weight, norm.power) == (True, 2.0)
    assert convert_norms(model).left == {"1": "already converted to RangeNorm"}
    batches = [torch.randn(32, 4) for _ in range(5)]
    assert recalibrate_norms(model, batches, 5).norms == ("1",)
    largest = torch.stack([model[0](x).detach().square().amax(0) for x in batches])
    torch.testing.assert_close(norm.running_square, largest.median(0).values)
    folded = fold_norms(model.eval(), batches[0])
    assert [site.status for site in folded.norms] == ["forward"]
    torch.testing.assert_close(folded.model(batches[0]), model(batches[0]), rtol=1e-4, atol=1e-5)


def test_a_new_norms_options_and_name_are_in_the_errors(range_target: str) -> None:
    model = nn.Sequential(nn.LayerNorm(8))
    with pytest.raises(TypeError, match=r"no option 'center'\. It takes eps, power, sync"):
        convert_norms(model, range_target, center=False)
    with pytest.raises(ValueError, match="'power', 'prepbn', 'range', 'repbn'"):
        convert_norms(model, "spread")


def test_a_plan_changes_nothing_until_it_is_carried_out() -> None:
    for name, successor in TARGETS.items():
        norm = nn.LayerNorm(8)
        before = dict(vars(norm)), type(norm), copy.deepcopy(norm.state_dict())
        (layer,) = find_norms(norm)
        plan = successor.plan_from_norm(layer)
        assert (dict(vars(norm)), type(norm)) == before[:2]
        assert all(torch.equal(value, before[2][key]) for key, value in norm.state_dict().items())
        made = plan.carry_out()
        assert isinstance(made, successor)
        assert (id(made) == id(norm)) == (name in ("prepbn", "taper"))
        assert name == "srms" or made.get_parameter("weight") is norm.weight  # SRMSNorm has no weight


@pytest.mark.parametrize("successor", [RepBN, UnifiedNorm, PowerNorm])
def test_from_norm_takes_size_axis_precision_and_mode(successor: type[ChannelNorm]) -> None:
    norm = nn.LayerNorm(8, dtype=torch.float64).eval()
    nn.init.normal_(norm.weight)
    (layer,) = find_norms(norm)
    made = successor.from_norm(layer, eps=1e-3)
    assert isinstance(made, successor)
    assert (made.num_features, made.channel_dim, made.eps, made.training) == (8, -1, 1e-3, False)
    assert made.weight is norm.weight
    assert {parameter.dtype for parameter in made.parameters()} == {torch.float64}


def test_from_norm_says_why_there_is_no_successor() -> None:
    (layer,) = find_norms(nn.LayerNorm((4, 8)))
    with pytest.raises(StabNormError, match="its channels are on 2 axes"):
        RepBN.from_norm(layer)
    (layer,) = find_norms(nn.LayerNorm(8))
    with pytest.raises(StabNormError, match="its bias would be lost: center=False"):
        RepBN.from_norm(layer, center=False)
    with pytest.raises(ValueError, match="eval_mode='mix' is unknown"):
        PRepBN.from_norm(layer, eval_mode="mix")


@pytest.mark.parametrize(
    "norm",
    [RepBN(6), RepBN(6, center=False), UnifiedNorm(6), PowerNorm(6), PowerNorm(6, groups=2), PRepBN(6), PRepBN((2, 3))],
    ids=["rep", "scale only", "unified", "power", "groups", "prep", "prep over two axes"],
)
def test_batch_statistics_are_the_running_ones_of_that_batch_alone(norm: EvalAffineNorm) -> None:
    mask = torch.arange(9) < torch.tensor([[4], [9], [7]])
    x = torch.randn(3, 9, 6) + 1
    shaped = x.reshape(3, 9, *getattr(norm, "normalized_shape", (6,)))
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    got = norm.batch_statistics(torch.where(mask.reshape(3, 9, *[1] * (shaped.ndim - 2)), shaped, torch.inf), mask)
    assert all(torch.equal(buffer, before[name]) for name, buffer in norm.named_buffers())
    assert got.shape == (len(norm.running_statistics()), 6)
    rows = x[mask]
    if isinstance(norm, PowerNorm) and norm.groups:
        groups = rows.unflatten(-1, (2, 3))
        rows = (groups / (groups.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2)
    want = torch.stack([rows.mean(0), rows.var(0)]) if len(got) == 2 else rows.square().mean(0)[None]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert norm.batch_statistics(torch.full_like(shaped, torch.nan)).isnan().all()
    assert norm.batch_statistics(shaped, torch.zeros_like(mask)).isnan().all()


def test_one_row_has_no_unbiased_variance() -> None:
    norm = RepBN(6)
    assert running_values(norm.moments(torch.randn(1, 6), None, center=True))[1].eq(0).all()


@pytest.mark.parametrize("make", [UnifiedNorm, PowerNorm])
def test_the_official_variant_is_a_class_of_its_own_that_copies_and_loads_as_itself(make: type[ChannelNorm]) -> None:
    norm = make(6, variant="official")  # type: ignore[call-arg]
    assert isinstance(norm, make)
    assert (norm.variant, make(6).variant) == ("official", "corrected")  # type: ignore[call-arg]
    norm(torch.randn(2, 5, 6))
    keys = list(norm.state_dict())
    assert keys[:2] == ["weight", "bias"]
    assert all(key.startswith("official.") for key in keys[2:])
    for twin in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert type(twin) is type(norm)
        assert repr(twin) == repr(norm)
        assert twin.get_parameter("weight") is twin.get_submodule("official").weight
        x = torch.randn(2, 5, 6)
        assert torch.equal(twin(x), norm(x))
    assert repr(norm).startswith(f"{make.__name__}(\n  6, ")
    with pytest.raises(StabNormError, match="keeps statistics of its own"):
        norm.running_statistics()
    with pytest.raises(ValueError, match=r"variant='paper' is unknown\. Choose one of 'corrected', 'official'"):
        make(6, variant="paper")  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="RepBN has no variant='official'"):
        RepBN(6, variant="official")  # type: ignore[call-arg]
