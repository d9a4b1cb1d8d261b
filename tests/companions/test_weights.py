"""What each optimizer step does to each matrix, against float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabnorm import StabilityMonitor
from stabnorm.companions.weights import WeightCompanion
from tests.companions.nets import Text, batch, loss


def train(
    model: nn.Module, optimizers: list[Any], steps: int = 3, companion: Any = "weights", *, forward: Any = None
) -> tuple[StabilityMonitor, list[dict[str, tuple[Tensor, Tensor]]]]:
    """Train, and return the weights before and after each step."""
    taken = []
    with StabilityMonitor(model, "economy", companions=[companion]) as monitor:
        for _ in range(steps):
            (forward or (lambda: loss(model, batch())))().backward()
            before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()  # gradients may be gone by the time of monitor.step
            taken.append({name: (before[name], p.detach().double()) for name, p in model.named_parameters()})
            taken[-1] = {name: (a, b.clone()) for name, (a, b) in taken[-1].items()}
            monitor.step()
    return monitor, taken


def check(monitor: StabilityMonitor, taken: list[dict[str, tuple[Tensor, Tensor]]], rates: dict[str, float]) -> None:
    track = monitor.companions["weights"]
    history = track.history()
    for step, weights in enumerate(taken):
        for row, name in enumerate(track.rows):
            w, after = (t.flatten() for t in weights[name])
            dw = after - w
            cosine = float(w @ after / w.norm() / after.norm())
            expected = {
                "update_ratio": dw.norm() / w.norm(),
                "angular_update": math.acos(min(1.0, cosine)),
                "radial_share": (w @ dw) ** 2 / (w @ w) / (dw @ dw),
                "effective_learning_rate": rates[name] / (w @ w),
                "weight_norm": w.norm(),
            }
            for measure, value in expected.items():
                got = float(history[measure][step, row])
                assert got == pytest.approx(float(value), rel=1e-4, abs=5e-6), (measure, name, step)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_figures_are_those_of_float64(kind: Any) -> None:
    model = Text()
    optimizer = kind(model.parameters(), lr=0.03, weight_decay=0.1)
    monitor, taken = train(model, [optimizer])
    check(monitor, taken, dict.fromkeys(taken[0], 0.03))


def test_each_matrix_has_the_learning_rate_of_its_own_group_and_optimizer() -> None:
    model = Text()
    head, rest = list(model.head.parameters()), [p for n, p in model.named_parameters() if not n.startswith("head")]
    groups: list[dict[str, Any]] = [{"params": rest[:1], "lr": 0.5}, {"params": rest[1:]}]
    first = torch.optim.SGD(groups, lr=0.1)
    second = torch.optim.AdamW(head, lr=torch.tensor(0.01))
    monitor, taken = train(model, [first, second])
    names = list(taken[0])
    rates = {name: 0.01 if name.startswith("head") else 0.1 for name in names} | {"tokens.weight": 0.5}
    check(monitor, taken, rates)


def test_what_no_optimizer_steps_on_has_no_update_and_still_a_norm(caplog: pytest.LogCaptureFixture) -> None:
    model = Text()
    model.tokens.requires_grad_(False)
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    monitor, _ = train(model, [optimizer])
    track = monitor.companions["weights"]
    missing = track.history()["update_ratio"].isnan().all(0).tolist()
    assert [name for name, mute in zip(track.rows, missing, strict=True) if not mute] == ["head.weight"]
    assert not track.history()["top_singular_value"].isnan().any()
    assert "no optimizer step was seen on attentions.0.qkv.weight, attentions.0.proj.weight." in caplog.text


def test_a_closure_that_computes_gradients_within_the_step_is_seen() -> None:
    model, x = Text(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model, x)
        value.backward()
        return value

    with StabilityMonitor(model, "economy", companions=["weights", "embedding"]) as monitor:
        optimizer.step(closure)
        monitor.step()
    assert (monitor.companions["weights"].history()["update_ratio"] > 0).all()
    assert (monitor.companions["embedding"].history()["embedding_gradient_ratio"] > 0).all()


def test_of_an_optimizer_that_wraps_another_the_whole_step_counts() -> None:
    class Twice(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            super().__init__(inner.param_groups, {})
            self.inner = inner

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            with torch.no_grad():
                for group in self.param_groups:
                    for parameter in group["params"]:
                        parameter.mul_(1.1)
            self.inner.step()

    model = Text()
    monitor, taken = train(model, [Twice(torch.optim.SGD(model.parameters(), lr=0.03))])
    check(monitor, taken, dict.fromkeys(taken[0], 0.03))
    assert (monitor.companions["weights"].history()["update_ratio"] > 0.09).all()


def test_a_step_that_a_loss_scaler_skips_is_none() -> None:
    model = Text()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with StabilityMonitor(model, companions=["weights", "embedding"]) as monitor:
        for factor in (1.0, torch.inf, 1.0):
            optimizer.zero_grad()
            scaler.scale(factor * loss(model, batch())).backward()
            scaler.step(optimizer)
            monitor.step(grad_scale=scaler.get_scale())
            scaler.update()
    assert monitor.companions["weights"].history()["update_ratio"].isnan().all(1).tolist() == [False, True, False]
    ratio = monitor.companions["embedding"].history()["embedding_gradient_ratio"]
    assert ratio.isnan()[:, 0].tolist() == [False, True, False]


def test_a_step_that_fails_spoils_no_later_one() -> None:
    model = Text()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03)

    def failing() -> float:
        raise RuntimeError("boom")

    companion = WeightCompanion().watch(model)
    companion.attach()
    with pytest.raises(RuntimeError, match="boom"):
        optimizer.step(failing)
    companion.discard()
    loss(model, batch()).backward()
    optimizer.step()
    assert not companion.take().update.isnan().any()
    companion.detach()


def test_a_weight_before_a_norm_moves_across_itself_without_weight_decay() -> None:
    model = nn.Sequential(nn.Linear(9, 16, bias=False), nn.LayerNorm(16, elementwise_affine=False), nn.Linear(16, 3))
    target = torch.randn(8, 3)
    monitor, _ = train(
        model,
        [torch.optim.SGD(model.parameters(), lr=0.5)],
        forward=lambda: (model(torch.randn(8, 9)) - target).square().mean(),
    )
    share = monitor.companions["weights"].history()["radial_share"]
    assert (share[:, 0] < 1e-6).all()
    assert (share[:, 1] > 1e-4).any()


def test_weight_decay_alone_is_radial_and_turns_nothing() -> None:
    weight = nn.Linear(6, 5)
    model = nn.Sequential(weight, nn.LayerNorm(5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    monitor, _ = train(model, [optimizer], forward=lambda: 0.0 * model(torch.randn(2, 6)).sum())
    history = monitor.companions["weights"].history()
    torch.testing.assert_close(history["update_ratio"], torch.full((3, 1), 0.05), rtol=1e-5, atol=0)
    torch.testing.assert_close(history["radial_share"], torch.ones(3, 1), rtol=1e-5, atol=0)
    assert history["angular_update"].abs().max() < 1e-4


def test_a_matrix_of_zeros_is_no_error() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    nn.init.zeros_(model.get_parameter("0.weight"))
    monitor, _ = train(
        model, [torch.optim.SGD(model.parameters(), 0.1)], 2, forward=lambda: model(torch.randn(3, 4))[:, 0].sum()
    )
    history = monitor.companions["weights"].history()
    assert history["update_ratio"][0].isinf().all() or history["update_ratio"][0].isnan().all()
    assert (history["top_singular_value"][0] >= 0).all()
    assert monitor.alerts == []


def test_the_top_singular_value_is_found_and_followed() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 40))
    companion = WeightCompanion().watch(model)
    companion.attach()
    weights = [model.get_parameter("0.weight"), model.get_parameter("3.weight")]

    def errors() -> list[float]:
        singular = companion.take().singular
        exact = [torch.linalg.matrix_norm(p.detach().double().flatten(1), 2) for p in weights]
        return [abs(float(f / e) - 1) for f, e in zip(singular, exact, strict=True)]

    assert max(errors()) < 0.1
    for _ in range(150):
        companion.take()
    assert max(errors()) < 1e-5
    with torch.no_grad():
        for weight in weights:
            weight.add_(0.01 * torch.randn_like(weight))
    assert max(errors()) < 1e-2
    companion.detach()


def test_the_singular_value_is_compared_with_what_the_weight_decay_of_its_own_group_lets_it_grow_to() -> None:
    model = Text()
    head = {"params": [model.head.weight], "weight_decay": 0.5, "lr": torch.tensor(0.02)}
    others = {"params": [p for name, p in model.named_parameters() if name != "head.weight"], "weight_decay": 0.0}
    monitor, _ = train(model, [torch.optim.AdamW([head, others], lr=0.01)], 40)
    track = monitor.companions["weights"]
    found = track.history()["singular_to_proxy"]
    row = track.rows.index("head.weight")
    rows, columns = model.head.weight.shape
    assert rows != columns
    exact = torch.linalg.matrix_norm(model.head.weight.detach().double(), 2)
    assert float(found[-1, row]) == pytest.approx(float(exact) / (math.sqrt(0.02 / 0.5) * columns**0.75), rel=1e-2)
    assert [bool(column.isnan().all()) for column in found.T] == [name != "head.weight" for name in track.rows]


def test_the_ratio_to_the_proxy_stays_when_a_matrix_is_scaled_as_the_rule_says() -> None:
    found = []
    for factor in (1.0, 4.0):  # the matrix grows by 4, and lr / weight_decay by 16
        torch.manual_seed(1)
        linear = nn.Linear(6, 5, bias=False)
        with torch.no_grad():
            linear.weight.mul_(factor)
        optimizer = torch.optim.AdamW(linear.parameters(), lr=1e-6, weight_decay=1e-6 / factor**2)
        monitor, _ = train(
            nn.Sequential(linear, nn.LayerNorm(5)), [optimizer], 1, forward=lambda m=linear: m(torch.ones(2, 6)).sum()
        )
        found.append(float(monitor.companions["weights"].history()["singular_to_proxy"]))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_bfloat16_weights_are_measured_in_float32() -> None:
    model = nn.Sequential(nn.Linear(33, 17), nn.LayerNorm(17)).to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    g = torch.randn(4, 17, dtype=torch.bfloat16)
    monitor, taken = train(
        model, [optimizer], forward=lambda: (model(torch.randn(4, 33, dtype=torch.bfloat16)) * g).sum()
    )
    check(monitor, taken, {"0.weight": 2.0})


def test_patterns_choose_and_vectors_are_no_matrices() -> None:
    model = Text()
    model.positions = nn.Parameter(torch.randn(1, 7, 24))
    rows = WeightCompanion().watch(model).rows
    assert rows == ("tokens.weight", "attentions.0.qkv.weight", "attentions.0.proj.weight", "head.weight")
    assert WeightCompanion(include="proj|head", exclude="head").watch(model).rows == ("attentions.0.proj.weight",)
    with pytest.raises(ValueError, match=r"no weight matrix found in Text under include='encoder'"):
        WeightCompanion(include="encoder").watch(model)
    with pytest.raises(ValueError, match="not a valid regular expression"):
        WeightCompanion(include="(").watch(model)


def test_hooks_come_off() -> None:
    from torch.optim import optimizer as module

    before = len(module._global_optimizer_pre_hooks), len(module._global_optimizer_post_hooks)
    model = Text()
    with StabilityMonitor(model, companions=["weights", "embedding"]):
        assert len(module._global_optimizer_post_hooks) == before[1] + 2
    assert (len(module._global_optimizer_pre_hooks), len(module._global_optimizer_post_hooks)) == before


def excesses(rates: list[float], state: Any = None, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Any]:
    """The excess of a matrix of ones that each step changes by the learning rate, and the monitor's state."""
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.LayerNorm(3)).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    monitor = StabilityMonitor(model, ["amax"], companions=["weights"])
    if state is not None:
        monitor.load_state_dict(state)
    with monitor:
        for rate in rates:
            weight = model.get_parameter("0.weight")
            with torch.no_grad():
                weight.fill_(1.0)
                if dtype == torch.bfloat16:
                    weight[0, 0] = 0.01  # a small weight that moves where all others are rounded back
            optimizer.param_groups[0]["lr"] = rate
            weight.grad = torch.ones_like(weight)
            optimizer.step()
            monitor.step()
        saved = monitor.state_dict()
    return monitor.companions["weights"].history()["update_excess"][:, 0], saved


def test_the_excess_is_calm_when_a_schedule_returns_to_a_rate_and_rises_beyond_the_rates_it_has_lived_with() -> None:
    restarts = [*[0.2] * 140, *[0.01] * 60, *[0.2] * 20]
    assert excesses(restarts)[0].tolist() == pytest.approx([1.0] * len(restarts), rel=1e-4)
    ramp = [*[0.1] * 140, 0.2, 0.4, *[0.4] * 130]
    found, _ = excesses(ramp)
    assert found[139:142].tolist() == pytest.approx([1.0, 2.0, 4.0], rel=1e-4)
    assert found[141 + 127].item() == pytest.approx(2.0, rel=1e-4)  # 128 steps after the first rise: 0.4 / 0.2
    assert found[-1].item() == pytest.approx(1.0, rel=1e-4)
    assert excesses([0.0, 0.1])[0][1].item() == pytest.approx(1.0, rel=1e-4)


def test_in_bfloat16_a_schedule_that_returns_from_a_rate_whose_steps_are_rounded_away_is_calm() -> None:
    restarts = [*[0.25] * 140, *[0.001] * 60, *[0.25] * 20]
    found, _ = excesses(restarts, dtype=torch.bfloat16)
    resolved = torch.tensor(restarts) > 0.1
    assert found[resolved].tolist() == pytest.approx([1.045] * 160, rel=1e-2)
    assert found[~resolved].isnan().all()


def test_in_bfloat16_a_rise_out_of_steps_that_are_rounded_away_is_seen() -> None:
    found, _ = excesses([*[0.001] * 140, 0.25], dtype=torch.bfloat16)
    bound = torch.finfo(torch.bfloat16).eps / 4 / 0.001
    assert found[:140].tolist() == pytest.approx([bound] * 140, rel=1e-3)
    assert found[140].item() == pytest.approx(261, rel=1e-2)


def test_a_step_that_moves_nothing_has_no_excess() -> None:
    assert excesses([0.0, 1e-9])[0].isnan().all()


def test_the_excess_of_a_resumed_run_goes_on_from_the_rates_of_the_saved_one() -> None:
    _, state = excesses([0.1] * 140)
    found, _ = excesses([0.3], state)
    assert found[-1].item() == pytest.approx(3.0, rel=1e-4)
    for part in ("rates", "highest", "steps_taken"):  # as in an older state
        state["companions"]["weights"]["watch"].pop(part)
    found, _ = excesses([0.3], state)
    assert found[-1].item() == pytest.approx(1.0, rel=1e-4)
