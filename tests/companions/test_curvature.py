"""The curvature along the update: its value, its bound, and that nothing of the training is changed."""

import copy
import functools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stabnorm import StabilityMonitor
from stabnorm.companions import CurvatureCompanion, WeightCompanion, curvature
from stabnorm.companions.curvature import CurvatureWatch
from stabnorm.functional import adam_preconditioner, relative_curvature, stability_bound

Optimizer = torch.optim.Optimizer
MakeOptimizer = Callable[[Any], Optimizer]


class Net(nn.Module):
    """A small net with everything that a forward may change: dropout, batch statistics, a list and a counter."""

    def __init__(self, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.BatchNorm1d(8), nn.Dropout(dropout))
        self.head = nn.Linear(8, 3)
        self.calls, self.outputs = 0, list[Tensor]()
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.outputs.append(x.detach())
        y: Tensor = self.head(self.body(x))
        return y


def batch(step: int, size: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    random_numbers = torch.Generator().manual_seed(step)
    x = torch.randn(size, 4, generator=random_numbers)
    return x.to(dtype), torch.randint(3, (size,), generator=random_numbers)


def adam(parameters: Any) -> Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


def train(
    model: nn.Module, make: MakeOptimizer = adam, steps: int = 6, *, watched: bool = True, **options: Any
) -> tuple[Tensor, StabilityMonitor]:
    """Train with the companion; return its history."""
    optimizer = make(model.parameters())
    dtype = next(model.parameters()).dtype
    companions = [CurvatureCompanion(**{"every": 1, **options})] if watched else []
    monitor = StabilityMonitor(model, companions=companions)
    with monitor:
        for step in range(steps):
            x, y = batch(step, dtype=dtype)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            monitor.step(closure=lambda x=x, y=y: F.cross_entropy(model(x), y))  # type: ignore[misc]
    return (samples(monitor) if watched else torch.empty(0)), monitor


def samples(monitor: StabilityMonitor) -> Tensor:
    return monitor.companions["curvature"].history()["update_curvature"][:, 0]


def watch_of(monitor: StabilityMonitor) -> CurvatureWatch:
    watch = monitor.companions["curvature"].watch
    assert isinstance(watch, CurvatureWatch)
    return watch


# -- the formula -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.98, 1.02])
@pytest.mark.parametrize(
    ("learning_rate", "options"),
    [
        (0.1, {}),
        (0.1, {"momentum": 0.9}),
        (0.03, {"momentum": 0.9, "nesterov": True}),
        (0.1, {"momentum": 0.8, "dampening": 0.5}),
    ],
)
def test_sgd_grows_on_a_quadratic_just_beyond_the_bound_and_settles_just_below(
    share: float, learning_rate: float, options: dict[str, Any]
) -> None:
    bound = stability_bound(
        learning_rate, options.get("momentum", 0.0), 1 - options.get("dampening", 0.0),
        nesterov=options.get("nesterov", False),
    )  # fmt: skip
    w = nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = torch.optim.SGD([w], lr=learning_rate, **options)
    for _ in range(1500):
        optimizer.zero_grad()
        (share * bound * w.square() / 2).backward()
        optimizer.step()
    assert (w.abs() > 1) == (share > 1)


@pytest.mark.parametrize("share", [0.98, 1.02])
def test_adam_with_a_fixed_second_moment_grows_beyond_the_bound_and_settles_below(share: float) -> None:
    start = 1e-9  # so small that its gradients change no second moment
    w = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = torch.optim.Adam([w], lr=1e-3, betas=(0.9, 1 - 1e-15), eps=1e-3)
    w.grad = torch.zeros_like(w)
    optimizer.step()
    state = optimizer.state[w]
    state["step"].fill_(1e9)
    state["exp_avg_sq"].fill_(4.0 * (1 - (1 - 1e-15) ** 1e9))
    p = float(adam_preconditioner(state["exp_avg_sq"], 1e9, 1 - 1e-15, 1e-3))
    assert p == pytest.approx(2.001)
    bound = stability_bound(1e-3, 0.9, 1 - 0.9) * p
    largest = start
    for _ in range(1500):
        optimizer.zero_grad()
        (share * bound * w.square() / 2).backward()
        optimizer.step()
        largest = max(largest, abs(w.item()))
    assert (largest > 1e3 * start) == (share > 1)
    assert share > 1 or abs(w.item()) < start


def test_the_figure_of_a_quadratic_is_its_rayleigh_quotient_at_any_distance_and_never_above_the_largest() -> None:
    torch.manual_seed(1)
    root = torch.randn(5, 5, dtype=torch.float64)
    h, metric, w = root @ root.T, torch.rand(5, dtype=torch.float64) + 0.1, torch.randn(5, dtype=torch.float64)
    d = h @ w / metric

    def slope(at: float) -> Tensor:
        return d @ (h @ (w + at * d))

    wanted = d @ h @ d / (d @ (metric * d))
    for behind, ahead in ((0.0, 1e-3), (-0.5, 0.5), (-3.0, 1.0)):
        found = relative_curvature(slope(behind), slope(ahead), ahead - behind, d @ (metric * d))
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)
    assert wanted <= torch.linalg.eigvals(h / metric[:, None]).real.max()


# -- the companion's value ---------------------------------------------------------------------------------------------


def metric_of_sgd(group: dict[str, Any], state: dict[str, Any]) -> Tensor:
    b, weight = group["momentum"], 1 + 2 * group["momentum"] if group["nesterov"] else 1.0
    return torch.tensor(2 * (1 + b) / (group["lr"] * weight))


def metric_of_adam(group: dict[str, Any], state: dict[str, Any]) -> Tensor:
    (b1, b2), v = group["betas"], state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    p: Tensor = (v / (1 - b2 ** float(state["step"]))).sqrt() + group["eps"]
    bound: float = 2 * (1 + b1) / (1 - b1) / group["lr"]
    return bound * p


def step_of(gradient: Tensor, group: dict[str, Any], metric: Tensor) -> Tensor:
    """What the optimizer would take if all gradients were this one, from M = b P and the bound b of the optimizer."""
    b = group["betas"][0] if "betas" in group else group["momentum"]
    bound = float(metric) if "momentum" in group else 2 * (1 + b) / (1 - b) / group["lr"]
    step: Tensor = gradient / metric * bound * group["lr"] / (1.0 if "betas" in group else 1 - b)
    return step


def by_autograd(make: MakeOptimizer, metric: Callable[..., Tensor], decay: float, steps: int, reach: float) -> Tensor:
    """R in float64: by autograd's Hessian-vector product if `reach` is 0, else by the gradients at two points."""
    model, figures = Net(dtype=torch.float64), []
    optimizer = make(model.parameters())
    for step in range(steps):
        x, y = batch(step, dtype=torch.float64)
        before = copy.deepcopy(model)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        weights, trained = list(before.parameters()), list(model.parameters())

        def gradients(model: nn.Module, weights: list[nn.Parameter], x: Tensor = x, y: Tensor = y) -> Any:
            loss = F.cross_entropy(model(x), y) + sum(decay / 2 * w.square().sum() for w in weights)
            return torch.autograd.grad(loss, weights, create_graph=True)

        here = gradients(before, weights)
        group = optimizer.param_groups[0]
        metrics = [metric(group, optimizer.state.get(p, {})) for p in trained]
        s = [step_of(g.detach(), group, m) for g, m in zip(here, metrics, strict=True)]
        if reach:
            moved = copy.deepcopy(before)
            with torch.no_grad():
                for weight, part in zip(moved.parameters(), s, strict=True):
                    weight.add_(reach * part)
            products = [(b - a) / reach for a, b in zip(here, gradients(moved, list(moved.parameters())), strict=True)]
        else:
            slope: Any = sum((g * part).sum() for g, part in zip(here, s, strict=True))
            products = list(torch.autograd.grad(slope, weights))
        curved: Any = sum((h * part).sum() for h, part in zip(products, s, strict=True))
        figures.append(curved.detach() / sum((m * part.square()).sum() for m, part in zip(metrics, s, strict=True)))
    return torch.stack(figures).float()


OPTIMIZERS: dict[str, tuple[MakeOptimizer, Callable[..., Tensor], float]] = {
    "Adam": (lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.8, 0.95)), metric_of_adam, 0.0),
    "Adam with decay": (lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.3), metric_of_adam, 0.3),
    "amsgrad": (lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True), metric_of_adam, 0.0),
    "AdamW": (lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.3), metric_of_adam, 0.0),
    "SGD": (lambda p: torch.optim.SGD(p, lr=0.3, weight_decay=0.3), metric_of_sgd, 0.3),
    "momentum": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), metric_of_sgd, 0.0),
    "nesterov": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), metric_of_sgd, 0.0),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_short_moves_give_the_hessian_with_this_steps_gradient_in_the_second_moment(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curvature, "_REACH", 1e-5)  # where the loss is a parabola
    make, metric, decay = OPTIMIZERS[name]
    found, monitor = train(Net(dtype=torch.float64), make)
    assert watch_of(monitor)._knows_slope
    torch.testing.assert_close(found, by_autograd(make, metric, decay, 6, 0.0), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_sample_compares_the_slope_at_the_weights_with_that_one_whole_step_uphill(name: str) -> None:
    make, metric, decay = OPTIMIZERS[name]
    found, _ = train(Net(dtype=torch.float64), make)
    uphill, downhill = (by_autograd(make, metric, decay, 6, reach) for reach in (1.0, -1.0))
    torch.testing.assert_close(found, uphill, rtol=1e-5, atol=1e-7)
    both, _ = train(Net(dtype=torch.float64), make, both_sides=True)
    torch.testing.assert_close(both, torch.maximum(uphill, downhill), rtol=1e-5, atol=1e-7)


def test_float32_gives_the_figures_of_float64() -> None:
    exact, _ = train(Net(dtype=torch.float64))
    torch.testing.assert_close(train(Net())[0], exact, rtol=1e-3, atol=1e-4)


def test_a_learning_rate_of_zero_gives_no_sample_and_later_steps_still_need_one_pass() -> None:
    model = Net()
    optimizer = adam(model.parameters())
    with StabilityMonitor(model, companions=[CurvatureCompanion(1)]) as monitor:
        counted = _Count(monitor)
        for step in range(4):
            optimizer.param_groups[0]["lr"] = 1e-2 * step
            x, y = batch(step)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            monitor.step(closure=lambda x=x, y=y: F.cross_entropy(model(x), y))  # type: ignore[misc]
    assert samples(monitor).isfinite().tolist() == [False, True, True, True]
    assert counted.calls == 2 + 2 + 1 + 1


class _Count:
    """Counts how often a loss is computed again."""

    def __init__(self, monitor: StabilityMonitor) -> None:
        self.slope, self.calls = CurvatureWatch._slope, 0
        watch: Any = watch_of(monitor)
        watch._slope = self._counted(watch)

    def _counted(self, watch: CurvatureWatch) -> Callable[..., Tensor]:
        def counted(moves: Any) -> Tensor:
            self.calls += 1
            return self.slope(watch, moves)

        return counted


@pytest.mark.parametrize(
    ("case", "passes"),
    [("plain", 2 + 5), ("both sides", 3 + 5 * 2), ("clipped", 12), ("accumulated", 12), ("dropout", 12)],
)
def test_the_slope_at_the_weights_is_computed_again_unless_the_gradient_is_that_of_the_closure(
    case: str, passes: int
) -> None:
    model = Net(dropout=0.3 if case == "dropout" else 0.0)
    # With Adam's momentum, another mask of a dropout changes R by a thirty-eighth of what it changes the slope by.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if case == "dropout" else adam(model.parameters())
    with StabilityMonitor(model, companions=[CurvatureCompanion(1, case == "both sides")]) as monitor:
        counted = _Count(monitor)
        for step in range(6):
            optimizer.zero_grad()
            for part in range(2 if case == "accumulated" else 1):
                x, y = batch(10 * part + step)
                F.cross_entropy(model(x), y).backward()
            if case == "clipped":
                nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()
            monitor.step(closure=lambda x=x, y=y: F.cross_entropy(model(x), y))  # type: ignore[misc]
    assert counted.calls == passes
    assert samples(monitor).isfinite().all()


def test_clipping_changes_no_sample_of_sgd_while_its_steps_are_short_because_only_the_direction_counts() -> None:
    def sgd(parameters: Any, clip: bool) -> Optimizer:
        weights = list(parameters)
        optimizer = torch.optim.SGD(weights, lr=1e-5)  # all steps at about the same weights
        if clip:
            optimizer.register_step_pre_hook(lambda *_: nn.utils.clip_grad_norm_(weights, 1e-3) and None)  # type: ignore[arg-type]
        return optimizer

    plain, clipped = (train(Net(dtype=torch.float64), functools.partial(sgd, clip=clip))[0] for clip in (False, True))
    torch.testing.assert_close(plain, clipped, rtol=1e-2, atol=0)


def test_parameters_of_an_optimizer_without_a_bound_do_not_count_and_a_warning_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    found, _ = train(Net(), lambda p: torch.optim.NAdam(p, lr=1e-2))
    assert found.isnan().all()
    assert "no bound is known for the optimizer NAdam, only for Adam, AdamW and SGD" in caplog.text


def test_a_subclass_with_a_step_of_its_own_has_no_bound_and_one_without_has_it() -> None:
    class Renamed(torch.optim.Adam):
        pass

    class Other(torch.optim.Adam):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    plain, _ = train(Net())
    torch.testing.assert_close(train(Net(), lambda p: Renamed(p, lr=1e-2))[0], plain)
    assert train(Net(), lambda p: Other(p, lr=1e-2))[0].isnan().all()
    assert train(Net(), lambda p: torch.optim.SGD(p, lr=1e-3, maximize=True))[0].isnan().all()


def test_an_optimizer_around_another_is_measured_as_the_inner_one(caplog: pytest.LogCaptureFixture) -> None:
    class Around(Optimizer):
        def __init__(self, parameters: Any) -> None:
            self.inner = adam(parameters)
            super().__init__(self.inner.param_groups, {})

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            self.inner.step()

    torch.testing.assert_close(train(Net(), Around)[0], train(Net())[0])
    assert "no bound" not in caplog.text


# -- nothing is changed ------------------------------------------------------------------------------------------------


def everything(model: nn.Module) -> dict[str, Any]:
    return {
        **{name: value.clone() for name, value in model.state_dict().items()},
        **{f"{name}.grad": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor(np.random.get_state()[1].astype(np.int64)),  # type: ignore[union-attr, index]
        "python": torch.tensor(hash(random.getstate())),
    }


@pytest.mark.parametrize("make", [adam, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)])
def test_a_training_with_samples_is_bit_for_bit_the_training_without(make: MakeOptimizer) -> None:
    def trained(watched: bool) -> tuple[dict[str, Any], Net]:
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(3)
        model = Net(dropout=0.3)
        train(model, make, watched=watched)
        return everything(model), model

    (bare, plain), (seen, model) = trained(False), trained(True)
    assert bare.keys() == seen.keys()
    for name in bare:
        assert torch.equal(bare[name], seen[name]), name
    assert model.calls == plain.calls == len(model.outputs) == 6


def test_a_sample_leaves_gradients_themselves_in_place_also_when_the_closure_runs_a_backward(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, (x, y) = Net(), batch(0)
    optimizer = adam(model.parameters())

    def closure() -> Tensor:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    with StabilityMonitor(model, companions=[CurvatureCompanion(1)]) as monitor:
        closure()
        optimizer.step()
        before, gradients = everything(model), [p.grad for p in model.parameters()]
        monitor.step(closure=closure)
    assert all(p.grad is gradient for p, gradient in zip(model.parameters(), gradients, strict=True))
    after = everything(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "the loss could not be computed again" in caplog.text
    assert samples(monitor).isnan().all()


@pytest.mark.parametrize("raises", [ValueError, KeyboardInterrupt])
def test_a_closure_that_raises_leaves_everything_as_it_was(
    raises: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    model, (x, y) = Net(dropout=0.2), batch(0)
    optimizer = adam(model.parameters())

    def closure() -> Tensor:
        model(x)
        raise raises("no more data")

    with StabilityMonitor(model, companions=[CurvatureCompanion(1)]) as monitor:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        before = everything(model)
        if raises is KeyboardInterrupt:
            with pytest.raises(KeyboardInterrupt):
                monitor.step(closure=closure)
        else:
            monitor.step(closure=closure)
    after = everything(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert raises is KeyboardInterrupt or "ValueError: no more data" in caplog.text


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_norms_and_other_companions_count_no_forward_of_a_sample(compiled: bool) -> None:
    def histories(*more: CurvatureCompanion) -> list[Tensor]:
        model = Net()
        run = torch.compile(model.body, backend="eager") if compiled else model.body
        optimizer = adam(model.parameters())
        with StabilityMonitor(model, "full", companions=[*more, WeightCompanion(), "output"]) as monitor:
            for step in range(4):
                x, y = batch(step)
                optimizer.zero_grad()
                F.cross_entropy(model.head(run(x)), y).backward()
                optimizer.step()
                monitor.step(optimizer=optimizer, closure=lambda x=x, y=y: F.cross_entropy(model.head(run(x)), y))  # type: ignore[misc]
        tracks: list[Any] = [monitor, *(monitor.companions[name] for name in ("weights", "output"))]
        return [values for track in tracks for _, values in sorted(track.history().items())]

    for bare, seen in zip(histories(), histories(CurvatureCompanion(1)), strict=True):
        torch.testing.assert_close(bare, seen, rtol=0, atol=0, equal_nan=True)


def test_another_monitor_of_the_same_model_counts_no_forward_of_a_sample() -> None:
    model = Net()
    other = StabilityMonitor(model, ["amax"])
    other.attach()
    train(model, steps=3)
    other.step()
    other.detach()
    assert other.history()["tokens"].tolist() == [[3 * 16.0, 3 * 16.0]]


# -- precision, accumulation, schedule ---------------------------------------------------------------------------------


def test_autocast_to_bfloat16_gives_about_the_same_curvature() -> None:
    exact, _ = train(Net())
    model = Net()
    optimizer = adam(model.parameters())
    with StabilityMonitor(model, companions=[CurvatureCompanion(1)]) as monitor:
        for step in range(6):
            x, y = batch(step)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):  # around the whole step, so that its cache of weights is kept
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                monitor.step(closure=lambda x=x, y=y: F.cross_entropy(model(x), y))  # type: ignore[misc]
    torch.testing.assert_close(samples(monitor), exact, rtol=0.3, atol=0.05)


def test_the_scale_of_the_loss_changes_no_sample() -> None:
    def run(scale: float) -> Tensor:
        model = Net(dtype=torch.float64)
        optimizer = adam(model.parameters())
        with StabilityMonitor(model, companions=[CurvatureCompanion(1)]) as monitor:
            for step in range(3):
                x, y = batch(step, dtype=torch.float64)
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                monitor.step(closure=lambda x=x, y=y: F.cross_entropy(model(x), y), grad_scale=scale)  # type: ignore[misc]
        return samples(monitor)

    torch.testing.assert_close(run(1024.0), run(1.0), rtol=1e-6, atol=0)


def test_with_every_the_samples_come_at_every_nth_step_and_a_step_without_a_closure_waits_for_the_next(
    caplog: pytest.LogCaptureFixture,
) -> None:
    found, _ = train(Net(), every=3, steps=10)
    assert (~found.isnan()).nonzero()[:, 0].tolist() == [2, 5, 8]
    model = Net()
    optimizer = adam(model.parameters())
    with StabilityMonitor(model, companions=["curvature"]) as monitor:
        for step in range(8):
            x, y = batch(step)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            monitor.step()
    assert samples(monitor).isnan().all()
    assert "give monitor.step(closure=lambda: loss_function(model(x), y))" in caplog.text


def test_without_every_a_sample_is_as_rare_as_two_percent_of_the_time_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    from stabnorm.companions import _sampling

    clock = [0.0]
    monkeypatch.setattr("stabnorm.companions._sampling.time.perf_counter", lambda: clock[0])
    schedule, sampled = _sampling.Schedule(None, 0.5), []
    for step in range(1200):
        clock[0] += 1.0
        if schedule.due:
            sampled.append(step)
            with schedule.sample(torch.device("cpu")):
                clock[0] += 2.0 if step < 500 else 0.5
        schedule.end_step(False)
    gaps = np.diff(sampled)
    assert set(gaps[:4]) == {100}  # 2 seconds of 100
    assert set(gaps[-8:]) == {25}


def test_a_budget_that_allows_everything_still_leaves_four_steps_between_samples() -> None:
    found, _ = train(Net(), every=None, steps=8)
    assert (~found.isnan()).nonzero()[:, 0].tolist()[0] == 5


def sampled_steps(figures: list[float], monkeypatch: pytest.MonkeyPatch, every: int) -> list[int]:
    left = iter(figures)
    monkeypatch.setattr(CurvatureWatch, "_sample", lambda *_: torch.tensor(next(left)))
    found, _ = train(Net(), steps=len(figures), every=every)
    return (~found.isnan()).nonzero()[:, 0].tolist()


def test_after_a_sample_near_the_bound_the_next_come_soon_until_six_are_calm(monkeypatch: pytest.MonkeyPatch) -> None:
    calm = [0.1] * 100
    assert sampled_steps(calm, monkeypatch, 20) == [19, 39, 59, 79, 99]
    soon = [19, *range(24, 50, 5), 69, 89]
    assert sampled_steps([0.6, *calm], monkeypatch, 20)[: len(soon)] == soon
    longer = [19, *range(24, 75, 5), 94]
    assert sampled_steps([0.6] + [0.1] * 4 + [0.7, *calm], monkeypatch, 20)[: len(longer)] == longer
    assert sampled_steps([0.6, *calm], monkeypatch, 3)[:4] == [2, 5, 8, 11]


# -- the alarm ---------------------------------------------------------------------------------------------------------


def alerts_of(figures: list[float], monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str, float]]:
    left = iter(figures)
    monkeypatch.setattr(CurvatureWatch, "_sample", lambda *_: torch.tensor(next(left)))
    _, monitor = train(Net(), steps=len(figures))
    return [(a.step, a.statistic, a.threshold) for a in monitor.alerts if a.layer == "update"]


def test_an_alarm_needs_two_of_the_last_eight_samples_over_one_and_no_past(monkeypatch: pytest.MonkeyPatch) -> None:
    nan, calm = float("nan"), [0.1] * 7
    assert alerts_of([0.5, 2.0, 0.5, 0.5, 2.0, 0.5], monkeypatch) == [(4, "lasting_curvature", 1.0)]
    assert alerts_of([1.1, 1.2, 1.3], monkeypatch) == [(1, "lasting_curvature", 1.0)]
    assert alerts_of([171.0, *calm] * 3, monkeypatch) == []
    assert alerts_of([2.0, nan, -2.0, nan, nan, nan, nan, 2.0], monkeypatch) == [(7, "lasting_curvature", 1.0)]
    assert alerts_of([0.99] * 12, monkeypatch) == []


def test_an_older_state_with_fewer_samples_is_read() -> None:
    _, monitor = train(Net(), steps=1)
    watch = watch_of(monitor)
    watch.load_state_dict({**watch.state_dict(), "recent": torch.arange(4.0)})
    assert watch.take().recent.tolist()[-4:] == [0.0, 1.0, 2.0, 3.0]
    assert len(watch.take().recent) == 8


def test_an_alarm_that_lasts_is_raised_once_also_between_rare_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CurvatureWatch, "_sample", lambda *_: torch.tensor(3.0))
    _, monitor = train(Net(), steps=120, every=20)
    assert [alert.step for alert in monitor.alerts if alert.layer == "update"] == [24]  # samples come every 5 steps
    assert "lower the learning rate" in next(a for a in monitor.alerts if a.layer == "update").reason


def test_a_step_size_beyond_the_bound_of_a_parabola_alarms_and_one_below_does_not() -> None:
    for share, alarms in ((1.2, True), (0.8, False)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.LayerNorm(4, elementwise_affine=False), nn.Linear(4, 1, bias=False))
        x = torch.randn(32, 4)
        inputs = model[0](x)
        bound = 2 / torch.linalg.eigvalsh(2 * inputs.T @ inputs / len(x)).max()
        optimizer = torch.optim.SGD(model.parameters(), lr=share * float(bound))
        with StabilityMonitor(model, companions=[CurvatureCompanion(1)]) as monitor:
            for _ in range(12):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
                monitor.step(closure=lambda model=model, x=x: model(x).square().mean())  # type: ignore[misc]
        assert any(alert.layer == "update" for alert in monitor.alerts) is alarms


# -- resume and refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [5, 6, 7])
def test_a_run_that_is_saved_and_loaded_goes_on_as_if_it_had_not_stopped(half: int) -> None:
    whole, complete = train(Net(), steps=12, every=2)
    model = Net()
    optimizer = adam(model.parameters())

    def steps(monitor: StabilityMonitor, numbers: range) -> None:
        for step in numbers:
            x, y = batch(step)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            monitor.step(closure=lambda x=x, y=y: F.cross_entropy(model(x), y))  # type: ignore[misc]

    with StabilityMonitor(model, companions=[CurvatureCompanion(2)]) as first:
        steps(first, range(half))
        state = copy.deepcopy(first.state_dict())
    second = StabilityMonitor(model, companions=[CurvatureCompanion(2)])
    second.load_state_dict(state)
    with second:
        steps(second, range(half, 12))
    torch.testing.assert_close(samples(second), whole, rtol=0, atol=0, equal_nan=True)
    for a, b in zip(watch_of(second).take(), watch_of(complete).take(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_what_cannot_be_watched_is_refused_before_the_training() -> None:
    with pytest.raises(ValueError, match="every=0"):
        CurvatureCompanion(0)
    with pytest.raises(TypeError, match="both_sides"):
        CurvatureCompanion(both_sides="yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"body.0.weight is in torch.bfloat16, which is too coarse"):
        CurvatureCompanion().watch(Net(dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="Net has no parameter that is trained"):
        CurvatureCompanion().watch(Net().requires_grad_(False))
    model = Net()
    with StabilityMonitor(model) as monitor, pytest.raises(TypeError, match="closure"):
        monitor.step(closure=torch.ones(()))  # type: ignore[arg-type]
