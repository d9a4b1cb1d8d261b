"""The fit is a float64 least squares in one go, whatever comes in between: masks, lengths, ranks, constant channels."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stabnorm import StabNormError, convert_norms, remove_norms
from stabnorm.fit.sums import ChannelSums, Seen
from stabnorm.fit.watch import seen_in
from stabnorm.nn import PRepBN
from stabnorm.norms import NormSearch
from stabnorm.pretrained import Affine, Runner, fit_norms, measure_norms
from tests.pretrained.nets import Batch, batches, converted_pair, post_norm
from tests.processes import one_after_the_other, run_ranks


def least_squares(x: Tensor, y: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Scale and shift per channel, each by LAPACK on all rows at once."""
    scale, shift = [], []
    for c in range(x.shape[1]):
        design = np.stack([x[:, c].double().numpy(), np.ones(len(x))], 1)
        (a, b), *_ = np.linalg.lstsq(design, y[:, c].double().numpy(), rcond=None)
        scale.append(a)
        shift.append(b)
    return np.array(scale), np.array(shift)


def rows(model: nn.Module, name: str, seen: list[Batch], *, read: bool) -> Tensor:
    (layer,) = [layer for layer in NormSearch(model).found if layer.name == name]
    parts = []
    for batch in seen:
        (call,) = seen_in(model, [layer], batch, Runner())[name]
        assert call.valid is not None
        parts.append((call.read if read else call.written)[call.valid])
    return torch.cat(parts)


def test_each_norm_is_the_least_squares_fit_of_what_the_converted_model_reads() -> None:
    original, model, levels = converted_pair(post_norm(), batches())
    for level in levels:  # by hand, one after the other, on a twin that is converted alike
        before = copy.deepcopy(model)
        (name,) = level
        fits = fit_norms(model, original, batches(), [level], Runner())
        expected = least_squares(rows(before, name, batches(), read=True), rows(original, name, batches(), read=False))
        norm = model.get_submodule(name)
        assert isinstance(norm, PRepBN)
        assert norm.lam == 0
        scale, shift, _ = norm.fold_affine()
        assert np.abs(scale.numpy() - expected[0]).max() < 1e-6 * np.abs(expected[0]).max()
        assert np.abs(shift.numpy() - expected[1]).max() < 1e-6 * np.abs(expected[1]).max()
        fit = fits[name]
        assert isinstance(fit, Affine)
        x, y = rows(before, name, batches(), read=True).double(), rows(original, name, batches(), read=False).double()
        left = (y - x * scale - shift).square().mean(0) / y.var(0, correction=0)
        assert abs(fit.residual - float(left.mean())) < 1e-6


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_streaming_is_one_go_however_far_the_mean_is_from_zero(mean: float) -> None:
    x = torch.randn(1003, 5, dtype=torch.float64) + mean
    y = torch.randn(1003, 5, dtype=torch.float64) + 0.3 * x
    sums = ChannelSums(5)
    for part, wanted in zip(x.split(97), y.split(97), strict=True):
        sums.add(Seen(part, wanted, None), wanted)
    fit, (scale, shift) = sums.affine(), least_squares(x, y)
    assert np.abs(fit.scale.numpy() - scale).max() < 1e-6
    at_the_mean = np.abs(fit.shift.numpy() + mean * fit.scale.numpy() - shift - mean * scale)
    assert at_the_mean.max() < 1e-6


def test_padding_has_no_part_in_it() -> None:
    original, model, levels = converted_pair(post_norm(), batches())
    other = copy.deepcopy(model)
    garbage = [
        {**batch, "input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 17)}
        for batch in batches()
    ]
    fit_norms(model, original, batches(), levels, Runner())
    fit_norms(other, original, garbage, levels, Runner())
    for name, value in model.state_dict().items():
        assert torch.allclose(value, other.state_dict()[name], rtol=1e-5, atol=1e-6), name


def test_a_channel_without_variance_is_given_the_mean_of_what_it_should_write() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    x[:, 2] = 0.1  # not a binary fraction: its mean is off by rounding
    y = torch.randn(64, 4)
    sums = ChannelSums(4)
    for part, wanted in zip(x.split(7), y.split(7), strict=True):
        sums.add(Seen(part, wanted, None), wanted)
    fit = sums.affine()
    assert fit.scale[2] == 0
    assert abs(float(fit.shift[2] - y[:, 2].double().mean())) < 1e-9


def test_a_model_that_changes_what_its_norms_read_and_write_in_place_is_fitted_the_same() -> None:
    class Block(nn.Module):
        def __init__(self, inplace: bool) -> None:
            super().__init__()
            self.inplace, self.words = inplace, nn.Embedding(30, 6)
            self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(2))
            self.linear = nn.Linear(6, 6)
            nn.init.normal_(self.words.weight)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.words(ids)
            x = x.add_(ids[..., None] / 30) if self.inplace else x + ids[..., None] / 30
            x = self.norms[0](x)
            h = nn.functional.relu(self.norms[1](x), inplace=self.inplace)
            y: Tensor = x.add_(self.linear(h)) if self.inplace else x + self.linear(h)
            return y

    ids, fitted = [torch.randint(30, (8, 9)) for _ in range(3)], []
    for inplace in (False, True):
        torch.manual_seed(3)
        for fit in ("norms", "tables"):
            fitted.append(remove_norms(Block(inplace), ids, fit=fit).model(ids[0]))
    torch.testing.assert_close(fitted[2], fitted[0])
    torch.testing.assert_close(fitted[3], fitted[1])
    assert not torch.equal(fitted[0], fitted[1])


def test_an_output_without_variance_counts_as_reproduced() -> None:
    sums, x = ChannelSums(2), torch.randn(64, 2)
    y = torch.stack([2 * x[:, 0], torch.full((64,), 0.7)], 1)
    sums.add(Seen(x, y, None), y)
    fit = sums.affine()
    assert fit.residual < 1e-9
    assert torch.allclose(fit.scale, torch.tensor([2.0, 0.0]).double(), atol=1e-6)


def test_the_residual_is_the_monitors() -> None:
    from stabnorm import StabilityMonitor

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16))
    x = torch.randn(512, 6) * torch.rand(512, 1).mul(3).exp()
    with StabilityMonitor(model, ["affine_residual"]) as monitor:
        model(x)
        monitor.step()
        theirs = float(monitor.history()["affine_residual"][0, 0])
    measure = measure_norms(model.eval(), NormSearch(model).found, [x], Runner())
    assert theirs == pytest.approx(measure.residuals["1"], abs=1e-5)
    assert theirs > 0.05


def test_an_rms_norm_keeps_to_a_scale_when_its_successor_has_no_centre() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.RMSNorm(8), nn.Linear(8, 2)).eval()
    twin = copy.deepcopy(model)
    convert_norms(twin)
    x = torch.randn(200, 5)
    fit_norms(twin, model, [x], [["1"]], Runner())
    h = model[0](x).double()
    y = model[1](model[0](x)).double()
    scale, shift, _ = twin[1].fold_affine()  # type: ignore[operator]
    assert torch.allclose(scale, ((h * y).sum(0) / h.square().sum(0)).detach(), rtol=1e-5)
    assert not shift.any()


class Parallel(nn.Module):
    """Two norms that do not read each other, and one that reads both."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Linear(4, 8)
        self.q, self.k, self.last = nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inputs(x)
        y: Tensor = self.last(self.q(x).sin() * self.k(x * x))
        return y


def test_norms_that_do_not_read_each_other_share_a_pass() -> None:
    model = Parallel().eval()
    measure = measure_norms(model, NormSearch(model).found, [torch.randn(32, 4)], Runner())
    assert measure.levels == (("q", "k"), ("last",))
    passes: list[int] = []

    class Counting(list[Tensor]):
        def __iter__(self):  # type: ignore[no-untyped-def]  # noqa: ANN204
            passes.append(1)
            return super().__iter__()

    twin = copy.deepcopy(model)
    convert_norms(twin)
    fit_norms(twin, model, Counting([torch.randn(32, 4)]), measure.levels, Runner())
    assert len(passes) - 2 * passes.count(0) <= 4  # two levels, each asks once whether it may ask again
    assert {"q", "k", "last"} == {name for name, norm in twin.named_modules() if isinstance(norm, PRepBN)}


def test_leaving_a_forward_early_changes_nothing() -> None:
    original, model, levels = converted_pair(post_norm(), batches())
    other = copy.deepcopy(model)
    fit_norms(model, original, batches(), levels, Runner())
    calls = {name: 1 for level in levels for name in level}
    fit_norms(other, original, batches(), levels, Runner(), calls)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_a_norm_that_reads_nothing_finite_is_left_and_named() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)).eval()
    twin = copy.deepcopy(model)
    convert_norms(twin)
    fits = fit_norms(twin, model, [torch.full((3, 4), torch.nan)], [["1"]], Runner())
    assert fits == {"1": "it read or wrote something that is not finite"}
    assert twin[1].lam == 1


def test_a_loader_that_gives_its_batches_once_is_refused() -> None:
    original, model, levels = converted_pair(post_norm(), batches())
    with pytest.raises(ValueError, match="only once"):
        fit_norms(model, original, iter(batches()), levels, Runner())


def test_a_model_that_draws_in_eval_is_told_apart() -> None:
    sums = ChannelSums(3)
    with pytest.raises(StabNormError, match="do not run alike"):
        sums.add(Seen(torch.randn(4, 3), torch.randn(4, 3), None), torch.randn(5, 3))


# --- ranks ---


def _fitted(own_batches: list[Batch]) -> tuple[dict[str, Tensor], dict[str, float]]:
    original, model, levels = converted_pair(post_norm(), batches())
    measure = measure_norms(original, NormSearch(original).found, own_batches, Runner())
    linear = {name: feeder for name, feeder in measure.feeders.items() if feeder.kind == "linear"}
    assert len(linear) == 2
    fits = fit_norms(model, original, own_batches, levels, Runner(), measure.calls, linear)
    left = {name: fit.residual for name, fit in fits.items() if isinstance(fit, Affine)}
    return model.state_dict(), measure.residuals | {f"{name}, left": value for name, value in left.items()}


def _one_rank(rank: int, folder: Path) -> None:
    own_batches = batches(24, 32)[:5] if rank == 0 else batches(24, 32)[5:]  # not as many each
    own = batches(2, seed=30 + rank)
    removed = remove_norms(post_norm(), own_batches, steps=2, tolerance=1.0, held_out=own)
    torch.save((*_fitted(own_batches), removed.model.state_dict(), removed.error), f"{folder}/{rank}.pt")


@one_after_the_other
@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    run_ranks(_one_rank, tmp_path)
    state, residuals = _fitted(batches(24, 32))
    of_ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, value in state.items():
        assert torch.equal(of_ranks[0][0][name], of_ranks[1][0][name]), name
        torch.testing.assert_close(of_ranks[0][0][name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert of_ranks[0][1] == pytest.approx(residuals, abs=1e-6)
    assert of_ranks[0][3] == of_ranks[1][3] > 0
    assert all(torch.equal(value, of_ranks[1][2][name]) for name, value in of_ranks[0][2].items())
