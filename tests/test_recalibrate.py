"""Recalibration against medians in float64, and that nothing else moves, whatever happens."""

import collections
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stabnorm import StabNormError, recalibrate_norms, valid_tokens
from stabnorm.nn import PowerNorm, PRepBN, RepBN, UnifiedNorm
from tests.processes import one_after_the_other, run_ranks

WIDTH, BATCHES = 6, 9


def randomised(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.4, 0.5)
    for buffer in model.buffers():
        if buffer.is_floating_point() and buffer.ndim == 1:
            nn.init.uniform_(buffer, 0.5, 2.0)
    return model


def chain() -> nn.Sequential:
    """A chain of all norms with running statistics, so that a wrong input of one changes the next."""
    prep = PRepBN(WIDTH)
    model = nn.Sequential(
        nn.Linear(WIDTH, WIDTH), RepBN(WIDTH), nn.Dropout(0.5), nn.Linear(WIDTH, WIDTH), prep, nn.GELU(),
        nn.Linear(WIDTH, WIDTH), RepBN(WIDTH, center=False, filtration="calibrated"), nn.Linear(WIDTH, WIDTH),
        nn.BatchNorm1d(WIDTH, momentum=0.3), nn.Linear(WIDTH, WIDTH), UnifiedNorm(WIDTH, window=1),
        nn.Linear(WIDTH, WIDTH), PowerNorm(WIDTH), nn.Linear(WIDTH, 3),
    )  # fmt: skip
    randomised(model)
    prep.lam.fill_(0.4)
    return model


def batches(seed: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    data = [torch.randn(16, WIDTH, generator=generator) + 2 for _ in range(BATCHES)]
    data[3] *= 300  # a burst
    return data


def statistics_in_float64(model: nn.Sequential, x: Tensor) -> dict[str, list[Tensor]]:
    """What each norm of `chain` sees of one batch, written out by hand; dropout is off."""
    x, seen = x.double(), {}
    for name, module in model.named_children():
        p = {key: value.detach().double() for key, value in module.named_parameters()}
        if isinstance(module, nn.Linear):
            x = x @ p["weight"].T + p["bias"]
        elif isinstance(module, nn.GELU):
            x = nn.functional.gelu(x)
        elif isinstance(module, nn.Dropout):
            continue
        else:
            mean, square = x.mean(0), x.square().mean(0)
            var = x.var(0, correction=0)
            scale_only = isinstance(module, UnifiedNorm | PowerNorm) or (
                isinstance(module, RepBN) and not module.center
            )
            seen[name] = [square] if scale_only else [mean, x.var(0, correction=1)]
            eps: Any = module.eps
            z = x / (square + eps).sqrt() if scale_only else (x - mean) / (var + eps).sqrt()
            if isinstance(module, PRepBN):
                lam = float(module.lam)
                norm = nn.functional.layer_norm(x, (WIDTH,), p["weight"], p["bias"], eps)
                x = lam * norm + (1 - lam) * (z * p["rep.weight"] + p["rep.bias"] + p["rep.eta"] * x)
            else:
                x = z * p["weight"] + p.get("bias", torch.zeros(())) + p.get("eta", torch.zeros(())) * x
    return seen


def held(module: Any) -> list[Tensor]:
    module = module.rep if isinstance(module, PRepBN) else module
    if isinstance(module, UnifiedNorm | PowerNorm):
        return [module.running_square]
    return [buffer for buffer in (module.running_mean, module.running_var) if buffer is not None]


NORMS = ("1", "4", "7", "9", "11", "13")


def test_statistics_are_the_medians_of_the_batches_own_whatever_a_burst_says() -> None:
    model = chain()
    report = recalibrate_norms(model, batches(), BATCHES)
    assert (report.norms, report.batches, report.left, report.kept) == (NORMS, BATCHES, {}, True)
    seen = [statistics_in_float64(model, x) for x in batches()]
    for name in NORMS:
        for part, buffer in enumerate(held(model[int(name)])):
            each = torch.stack([of_batch[name][part] for of_batch in seen])
            torch.testing.assert_close(buffer.double(), each.median(0).values, rtol=2e-5, atol=2e-5)
    first = torch.stack([of_batch["1"][1] for of_batch in seen])
    assert (first.mean(0) / held(model[1])[1]).min() > 100  # what a mean would have made of it


def everything(model: nn.Module) -> dict[str, Any]:
    return {
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
        "identities": [id(tensor) for tensor in (*model.buffers(), *model.parameters())],
        "modes": [module.training for module in model.modules()],
        "hooks": [len(module._forward_pre_hooks) for module in model.modules()],
        "momenta": [getattr(module, "momentum", None) for module in model.modules()],
        "gradients": [p.grad if p.grad is None else p.grad.clone() for p in model.parameters()],
        "random": [torch.get_rng_state(), torch.from_numpy(np.random.get_state()[1].copy())],  # type: ignore[index]
        "python": random.getstate(),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def mixed_modes(model: nn.Sequential) -> nn.Sequential:
    """As it may be in the midst of a training: some gradients, a frozen part, filled windows."""
    for x in batches()[:3]:
        model(x).backward(torch.randn(16, 3))
    model[4].eval()
    model[9].eval()
    return model


def test_nothing_but_the_statistics_changes() -> None:
    model = mixed_modes(chain())
    before = everything(model)

    def draws(model: nn.Module, x: Tensor) -> None:
        model(x + 0 * torch.rand(1))
        random.random()
        np.random.rand()

    recalibrate_norms(model, batches(), BATCHES, forward=draws)
    after = everything(model)
    moved = {name for name in before["buffers"] if not torch.equal(before["buffers"][name], after["buffers"][name])}
    assert moved == {
        "1.running_mean", "1.running_var", "4.rep.running_mean", "4.rep.running_var", "7.running_var",
        "9.running_mean", "9.running_var", "11.running_square", "13.running_square",
    }  # fmt: skip
    del before["buffers"], after["buffers"]
    assert same(before, after)


class Broken(RuntimeError):
    pass


def failing_loader() -> Iterator[Tensor]:
    yield from batches()[:2]
    raise Broken


def failing_forward(model: nn.Module, x: Tensor) -> None:
    model(x)
    model.train()
    raise Broken


class FailingMetric:
    """Of the old model, or of the new one."""

    def __init__(self, good_calls: int) -> None:
        self.good_calls = good_calls

    def __call__(self, model: nn.Module) -> float:
        model.train()
        torch.rand(1)
        if not self.good_calls:
            raise Broken
        self.good_calls -= 1
        return 1.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"loader": failing_loader()},
        {"forward": failing_forward},
        {"metric": FailingMetric(0)},
        {"metric": FailingMetric(1)},
    ],
    ids=["loader", "forward", "metric before", "metric after"],
)
def test_an_exception_leaves_the_model_as_it_was(wrong: dict[str, Any]) -> None:
    model = mixed_modes(chain())
    before = everything(model)
    with pytest.raises(Broken):
        recalibrate_norms(model, **{"loader": batches(), "n_batches": BATCHES, **wrong})
    assert same(before, everything(model))


NAN = float("nan")


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ((1.0, 1.0), True),
        ((1.0, 0.9), True),
        ((1.0, 1.1), False),
        ((1.0, NAN), False),
        ((NAN, 1.0), True),
        ((NAN, NAN), False),
    ],
)
def test_the_new_statistics_stay_only_if_the_metric_does_not_get_worse(values: tuple[float, float], kept: bool) -> None:
    model, asked = chain(), []

    def metric(model: nn.Module) -> float:
        asked.append((model.training, torch.is_grad_enabled(), held(model[1])[0].clone()))  # type: ignore[index]
        return values[len(asked) - 1]

    before = everything(model)["buffers"]
    report = recalibrate_norms(model, batches(), BATCHES, metric)
    assert report.kept is kept
    assert report.before == pytest.approx(values[0], nan_ok=True)
    assert [state[:2] for state in asked] == [(False, False)] * 2
    assert not torch.equal(asked[0][2], asked[1][2])  # of the old statistics, then of the new ones
    after = everything(model)["buffers"]
    assert same(before, after) is not kept


def test_a_model_with_wrong_statistics_evaluates_as_it_trained_afterwards() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), RepBN(WIDTH), nn.Linear(WIDTH, 3))
    randomised(model)
    x = torch.randn(4096, WIDTH)
    trained = model(x)
    recalibrate_norms(model, x.split(512), 8, lambda m: float((m(x) - trained).square().mean()))
    torch.testing.assert_close(model.eval()(x), trained, rtol=0.1, atol=0.1)


def test_a_batch_that_is_not_finite_does_not_count() -> None:
    clean, dirty = chain(), chain()
    dirty.load_state_dict(clean.state_dict())
    poisoned = batches()
    poisoned[2] = poisoned[2] * torch.nan
    recalibrate_norms(dirty, poisoned, BATCHES)
    recalibrate_norms(clean, poisoned[:2] + poisoned[3:], BATCHES)
    for a, b in zip(clean.buffers(), dirty.buffers(), strict=True):
        assert torch.equal(a, b)


def test_padding_does_not_count() -> None:
    model = nn.ModuleDict({"rep": RepBN(4, channel_dim=1), "grid": PRepBN((2, 4)), "batch": nn.BatchNorm1d(4)})
    x = torch.randn(3, 5, 8)
    mask = torch.arange(5) < torch.tensor([[2], [5], [3]])
    x[~mask] = 1e6

    def forward(model: Any, batch: tuple[Tensor, Tensor]) -> None:
        x, mask = batch
        model["rep"](x[..., :4].transpose(1, 2), mask)
        with valid_tokens(mask):
            model["grid"](x.unflatten(-1, (2, 4)))
            model["batch"](x[..., 4:].flatten(0, 1))

    recalibrate_norms(model, [(x, mask)], 1, forward=forward)
    valid = x[mask].double()
    rep, grid, batch = (held(module) for module in model.values())
    for got, want in ((rep, valid[:, :4]), (grid, valid), (batch, valid[:, 4:])):
        torch.testing.assert_close(got[0].double(), want.mean(0), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got[1].double(), want.var(0), rtol=1e-6, atol=1e-6)


def test_batches_come_as_tensors_tuples_or_mappings() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = RepBN(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(x)
            return y

    statistics = []
    pair = collections.namedtuple("pair", "x y")
    wraps: list[tuple[Any, Any]] = [
        (lambda x: x, None),
        (lambda x: (x, torch.zeros(1)), None),
        (lambda x: {"x": x}, None),
        (lambda x: pair(x, torch.zeros(1)), None),
        (lambda x: {"pair": pair(x, 0)}, lambda model, batch: model(batch["pair"].x)),
    ]
    for wrap, forward in wraps:
        model = Named()
        recalibrate_norms(model, [wrap(x) for x in batches()], BATCHES, forward=forward)
        statistics.append(model.norm.running_var)
    for other in statistics[1:]:
        assert torch.equal(statistics[0], other)


def test_a_compiled_model_is_measured_too() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), RepBN(WIDTH))
    compiled: Any = torch.compile(model, backend="eager")
    compiled(batches()[0])
    report = recalibrate_norms(compiled, batches(), BATCHES)
    assert report.batches == BATCHES
    seen = torch.stack([model[0](x).detach().double().mean(0) for x in batches()])
    torch.testing.assert_close(held(model[1])[0].double(), seen.median(0).values, rtol=1e-5, atol=1e-5)


def test_what_is_left_alone_is_named() -> None:
    model = nn.ModuleDict({"used": RepBN(WIDTH), "idle": RepBN(WIDTH), "old": UnifiedNorm(WIDTH, variant="official")})
    report = recalibrate_norms(model, batches(), 3, forward=lambda m, x: m["used"](x))  # type: ignore[index]
    assert report.norms == ("used",)
    assert report.left == {"idle": "it saw no finite input", "old": "the published variant keeps statistics of its own"}
    assert report.batches == 3


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="n_batches=0 is out of range"):
        recalibrate_norms(chain(), batches(), 0)
    with pytest.raises(ValueError, match="Sequential has no norm with running statistics"):
        recalibrate_norms(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), batches(), 1)
    with pytest.raises(StabNormError, match="the loader is empty"):
        recalibrate_norms(chain(), [], 1)
    with pytest.raises(StabNormError, match=r"in 2 batches no norm .* saw a finite input; the first is 1\."):
        recalibrate_norms(chain(), [x * torch.nan for x in batches()], 2)


def one_rank(rank: int, folder: Path) -> None:
    torch.manual_seed(0)
    model = chain()
    own = batches()[:4] if rank == 0 else batches()[4:]  # uneven: 4 and 5
    asked = iter([1.0, 0.9] if rank == 0 else [1.0, 1.05])  # worse here, better on the whole
    report = recalibrate_norms(model, own, BATCHES, lambda model: next(asked))
    torch.save((model.state_dict(), report.kept, report.after), f"{folder}/{rank}.pt")


@one_after_the_other
@pytest.mark.slow
def test_two_processes_take_the_median_over_the_batches_of_both(tmp_path: Path) -> None:
    run_ranks(one_rank, tmp_path)
    torch.manual_seed(0)
    model = chain()
    recalibrate_norms(model, batches(), BATCHES)
    for rank in (0, 1):
        state, kept, after = torch.load(tmp_path / f"{rank}.pt")
        assert kept
        assert after == pytest.approx(0.975)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-6, atol=1e-6, msg=name)


def test_kappa_0_is_the_mean_of_the_batches_and_kappa_1_the_average_of_batch_norm() -> None:
    """T22, AdaB2N's limits; torch's own BatchNorm is the truth for kappa = 1."""
    data = [torch.randn(7, WIDTH) * (1 + i) + i for i in range(BATCHES)]
    trained = nn.BatchNorm1d(WIDTH, momentum=0.3)
    nn.init.uniform_(trained.running_mean)  # type: ignore[arg-type]
    model = nn.Sequential(nn.BatchNorm1d(WIDTH)).eval()
    model[0].load_state_dict(trained.state_dict())
    for x in data:
        trained(x)
    recalibrate_norms(model, data, BATCHES, kappa=1, momentum=0.3)
    torch.testing.assert_close(model[0].running_mean, trained.running_mean)
    torch.testing.assert_close(model[0].running_var, trained.running_var)
    recalibrate_norms(model, data, BATCHES, kappa=0)
    torch.testing.assert_close(model[0].running_mean, torch.stack([x.mean(0) for x in data]).mean(0))
    torch.testing.assert_close(model[0].running_var, torch.stack([x.var(0) for x in data]).mean(0))


def test_between_the_limits_the_average_is_the_recursion_of_the_paper() -> None:
    data = [torch.randn(7, WIDTH) + i for i in range(5)]
    model = nn.Sequential(RepBN(WIDTH)).eval()
    nn.init.uniform_(model[0].running_mean, 1, 2)  # type: ignore[arg-type]
    expected, weight, kappa, momentum = model[0].running_mean.double(), 0.2**0.4, 0.4, 0.2  # type: ignore[union-attr]
    for x in data:
        expected = (1 - weight) * expected + weight * x.double().mean(0)
        weight = weight / (weight + (1 - momentum) ** kappa)
    recalibrate_norms(model, data, 5, kappa=kappa, momentum=momentum)
    torch.testing.assert_close(model[0].running_mean, expected.float())


@pytest.mark.parametrize("kappa", [None, 0.0, 0.5])
def test_alpha_mixes_old_and_new_statistics_and_at_0_changes_no_output(kappa: float | None) -> None:
    data = [torch.randn(7, WIDTH) + 1 for _ in range(4)]
    old, whole, part, none = (nn.Sequential(nn.BatchNorm1d(WIDTH)).eval() for _ in range(4))
    randomised(old)
    for model, alpha in ((whole, 1.0), (part, 0.25), (none, 0.0)):
        model.load_state_dict(old.state_dict())
        recalibrate_norms(model, data, 4, kappa=kappa, alpha=alpha)
    for buffer in ("running_mean", "running_var"):
        before, after, mixed = (getattr(model[0], buffer) for model in (old, whole, part))
        assert not torch.allclose(before, after)
        torch.testing.assert_close(mixed, 0.75 * before + 0.25 * after)
    x = torch.randn(9, WIDTH)
    torch.testing.assert_close(none(x), old(x), rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"kappa": 2}, {"kappa": "x"}, {"momentum": 0}, {"alpha": -0.1}, {"alpha": None}])
def test_an_average_out_of_range_is_refused_before_anything_runs(options: dict[str, Any]) -> None:
    model, name = nn.Sequential(nn.BatchNorm1d(WIDTH)), next(iter(options))
    with pytest.raises((TypeError, ValueError), match=f"{name}="):
        recalibrate_norms(model, [torch.randn(4, WIDTH)], 1, **options)
    assert not model.get_buffer("0.running_mean").any()
