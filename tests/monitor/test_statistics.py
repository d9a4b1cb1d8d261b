"""Every statistic against numpy float64 over the whole batch in one go, for every kind of norm and layout."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stabnorm import StabilityMonitor, find_norms
from stabnorm.companions import SwitchCompanion
from stabnorm.monitor.statistics import CATALOGUE, PRESETS, catalogue_table, resolve
from tests.monitor.norm_cases import CASES, Array, normalised, rows

STEPS = 9


class Reference:
    """The catalogue's formulas, written out once more, on ``x [tokens, channels]`` and gradient sums of every step."""

    def __init__(self, eps: float, per_channel: bool) -> None:
        self.eps, self.per_channel = eps, per_channel
        self.rows: list[dict[str, float]] = []
        self.average: dict[str, Any] = {}
        self.second_moments: list[Array] = []
        self.before: dict[str, Any] = {}

    def step(
        self, x: Array, n: Array | None, divided_by: Array | None, gain: Array, shift: Array | None,
        own: tuple[Array, Array] | None,
    ) -> None:  # fmt: skip
        out: dict[str, float] = {}
        mu, var, s, a = x.mean(0), x.var(0), (x**2).mean(0), np.abs(x).max(0)
        sigma, token_std, token_mean = np.sqrt(var + self.eps), x.std(1), x.mean(1)
        log_var, log_abs = np.log(var + self.eps), np.log(a + np.sqrt(self.eps))
        log_scale = np.log(token_std.mean() + np.sqrt(self.eps))
        g, old = gain / len(x), self.average
        if old:
            run_mu, run_var = self.before["own"] if own is not None else (old["mu"], old["var"])
            spread = 0.9 * (old["spread"] + 0.1 * (mu - old["mu"]) ** 2)
            out["running_mean_distance"] = np.sqrt(((mu - run_mu) ** 2).sum()) / len(mu)
            out["running_var_distance"] = np.sqrt(((var - run_var) ** 2).sum()) / len(mu)
            out["mean_discrepancy"] = (np.abs(run_mu - mu) / sigma).mean()
            out["var_discrepancy"] = np.abs(np.sqrt(run_var + self.eps) / sigma - 1).mean()
            out["mean_fluctuation"] = (np.sqrt(spread) / np.sqrt(old["var"] + self.eps)).mean()
            out["var_fluctuation"] = np.abs(log_var - self.before["log_var"]).mean()
            out["absmax_fluctuation"] = np.abs(log_abs - self.before["log_abs"]).mean()
            out["scale_jump"] = abs(log_scale - self.before["log_scale"])
            out["grad_fluctuation"] = np.sqrt(((g - old["g"]) ** 2).sum() / old["power"])
            now: dict[str, Any] = dict(mu=mu, var=var, g=g, power=(g**2).sum())
            average = {k: 0.9 * old[k] + 0.1 * v for k, v in now.items()}
            self.average = {**average, "spread": spread}
        else:
            self.average = dict(mu=mu, var=var, spread=0 * mu, g=g, power=(g**2).sum())
        self.before = dict(log_var=log_var, log_abs=log_abs, log_scale=log_scale, own=own)
        if len(self.second_moments) >= 4:
            window, new = np.stack(self.second_moments[-4:]), np.stack([*self.second_moments[-3:], s])
            gm_before = np.exp(np.log(window).mean(0))
            gap = (new.mean(0) - np.exp(np.log(new).mean(0))) / gm_before
            out["am_gm_ratio"] = gap.mean() / (4 * (np.sqrt(window).var(0) / gm_before).mean())
        self.second_moments.append(s)
        for name, value in (("std", token_std), ("mean", token_mean)):
            for how in ("mean", "min", "max"):
                out[f"token_{name}_{how}"] = getattr(value, how)()
        out["eps_share"] = float(np.mean((var if divided_by is None else divided_by) < 10 * self.eps))
        out["amax"], out["crest"] = a.max(), a.max() / np.sqrt((x**2).mean())
        out["feature_kurtosis"] = (s**2).mean() / s.mean() ** 2
        if n is None:
            out["affine_residual"] = 0.0
        else:
            dx, dn = x - mu, n - n.mean(0)
            out["affine_residual"] = 1 - ((dx * dn).mean(0) ** 2 / (var * (dn**2).mean(0))).mean()
        out["grad_gain"] = np.abs(g).mean()
        out["grad_shift"] = np.nan if shift is None else np.abs(shift).mean() / len(x)
        out["tokens"] = len(x)
        self.rows.append(out)

    def history(self) -> dict[str, Array]:
        return {k: np.array([row.get(k, np.nan) for row in self.rows]) for k in (*PRESETS["standard"], "tokens")}


def run(
    make: Callable[[], nn.Module], shape: tuple[int, ...], *, offset: float = 0.0, dtype: torch.dtype = torch.float32,
    micro_batches: int = 1, exact_gradients: bool = True,
) -> tuple[dict[str, Tensor], dict[str, Array]]:  # fmt: skip
    """History of a monitored norm fed random steps, and the reference for the same data."""
    module = make().to(dtype)
    for parameter in module.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    model = nn.Sequential(module)
    (norm,) = find_norms(model)
    reference = Reference(norm.eps, norm.kind == "batch")
    channels = torch.rand(norm.num_features) + 0.5
    along = [1] * len(shape)
    if norm.feature_dims > 1:
        channels = channels.reshape(shape[-norm.feature_dims :])
    else:
        along[norm.channel_dim] = -1
        channels = channels.reshape(along)
    if norm.running_mean is not None and norm.running_var is not None:
        own = (norm.running_mean.double().numpy().copy(), norm.running_var.double().numpy().copy())
        reference.before = {"own": own}
    with StabilityMonitor(model, flush_every=4) as monitor:
        for step in range(STEPS):
            scale = 1 + 0.3 * torch.rand(()) + (2 if step == 6 else 0)
            x = ((torch.randn(shape) + 0.5 * torch.randn(channels.shape)) * channels * scale + offset).to(dtype)
            g = torch.randn(shape).to(dtype)
            model.zero_grad()
            sums: list[tuple[Array, Array]] = []
            for part_x, part_g in zip(x.chunk(micro_batches), g.chunk(micro_batches), strict=True):
                y = model(part_x.clone().requires_grad_())
                y.backward(part_g)
            monitor.step()
            n, divided_by = normalised(module, x.double())
            if n is None:
                stack = rows(x, module)
                n_rows = (stack - stack.mean(0)) / np.sqrt(stack.var(0) + norm.eps)
            else:
                n_rows = rows(n, module)
            gain = np.ones(norm.num_features) if norm.gain is None else norm.gain.detach().double().numpy()
            weight, bias = norm.gain_parameter, norm.bias_parameter
            g_rows = rows(g, module)
            if exact_gradients or weight is None:
                at = n_rows if exact_gradients else rows(y.detach(), module)
                sums.append(((g_rows * at).sum(0) * gain, g_rows.sum(0) * gain))
            else:
                assert weight.grad is not None
                by_bias = weight.grad if bias is None or bias.grad is None else bias.grad
                sums.append(tuple(p.flatten().double().numpy() * gain for p in (weight.grad, by_bias)))
            has_shift = weight is None or bias is not None
            own_now = None
            if norm.running_mean is not None and norm.running_var is not None:
                own_now = (norm.running_mean.double().numpy().copy(), norm.running_var.double().numpy().copy())
            reference.step(
                rows(x, module), None if norm.kind == "batch" else n_rows,
                None if divided_by is None else divided_by.numpy(),
                sums[0][0], sums[0][1] if has_shift else None, own_now,
            )  # fmt: skip
    return monitor.history(), reference.history()


def natural_scale(name: str, reference: dict[str, Array]) -> float:
    """1 for what is dimensionless, the layer's rms (or its square) for what is in the input's unit."""
    rms = float(np.nanmean(reference["amax"] / reference["crest"]))
    if name == "tokens":
        return 1.0
    if CATALOGUE[name].unit == "gradient":
        return float(np.nanmax(np.abs(reference[name]), initial=0.0))
    return {"1": 1.0, "x": rms, "x^2": rms**2}[CATALOGUE[name].unit]


def assert_equals_reference(history: dict[str, Tensor], reference: dict[str, Array], tolerance: float = 1e-5) -> None:
    for name, expected in reference.items():
        got = history[name][:, 0].double().numpy()
        assert np.array_equal(np.isnan(got), np.isnan(expected)), name
        # A dimensionless number beyond 1 (a kurtosis, a crest) is compared relative to itself.
        scale = max(
            natural_scale(name, reference), float(np.nanmax(np.abs(expected), initial=0.0)) * (name != "tokens")
        )
        assert np.nanmax(np.abs(got - expected), initial=0.0) <= tolerance * scale, (name, got, expected)


@pytest.mark.parametrize("case", CASES)
def test_every_statistic_equals_float64_in_one_go(case: str) -> None:
    assert_equals_reference(*run(*CASES[case]))


@pytest.mark.parametrize("case", CASES)
def test_every_statistic_equals_float64_at_mean_1e4_and_std_1(case: str) -> None:
    # The layer's own float32 backward keeps four digits there, so the gradient it gave is the truth to compare with.
    assert_equals_reference(*run(*CASES[case], offset=1e4, exact_gradients=False))


@pytest.mark.parametrize("case", CASES)
def test_every_statistic_equals_float64_in_bfloat16(case: str) -> None:
    assert_equals_reference(*run(*CASES[case], dtype=torch.bfloat16, exact_gradients=False))


@pytest.mark.parametrize("case", [c for c in CASES if not c.startswith(("batch", "instance-u", "group", "instance"))])
def test_accumulation_gives_the_figures_of_one_batch(case: str) -> None:
    make, shape = CASES[case]
    torch.manual_seed(1)
    whole, _ = run(make, shape)
    torch.manual_seed(1)
    parts, reference = run(make, shape, micro_batches=3)
    for name in whole:
        scale = max(natural_scale(name, reference), float(np.nanmax(np.abs(reference[name]), initial=0.0)))
        difference = (whole[name] - parts[name]).abs().nan_to_num(0).max()
        assert float(difference) <= 1e-6 * scale, name


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_step_that_is_not_finite_has_no_affine_residual(bad: float) -> None:
    model = nn.Sequential(nn.LayerNorm(8))
    with StabilityMonitor(model, ["affine_residual"], gradients=False) as monitor:
        for step in range(3):
            x = torch.randn(16, 8)
            x[:, 0] = 2.0  # reproduces nothing
            if step == 1:
                x[3, 2] = bad
            model(x)
            monitor.step()
    assert monitor.history()["affine_residual"][:, 0].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("spoilt", [float("inf"), float("nan")])
def test_a_gradient_that_overflows_is_no_part_of_what_later_ones_are_compared_with(spoilt: float) -> None:
    rows = []
    for middle in (spoilt, None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.LayerNorm(8))
        with StabilityMonitor(model, ["grad_fluctuation", "mean_fluctuation"]) as monitor:
            for factor in (1.0, middle, 1.0, 1.0):
                y = model(torch.randn(6, 8))
                if factor is not None:
                    y.backward(factor * torch.linspace(-1, 1, 48).view(6, 8))
                monitor.step()
                model.zero_grad()
        rows.append({name: values[2:] for name, values in monitor.history().items()})
    for name, value in rows[0].items():
        assert bool(value.isfinite().all()), name
        torch.testing.assert_close(value, rows[1][name])


def test_the_catalogue_is_whole() -> None:
    families = {"F": 6, "S": 3, "O": 7, "P": 5}
    numbers = ["A", "A1", "C1", "N2", *(f"{name}{i + 1}" for name, last in families.items() for i in range(last))]
    assert {s.number for s in (*CATALOGUE.values(), *SwitchCompanion.statistics)} == set(numbers)
    assert set(PRESETS["economy"]) < set(PRESETS["standard"]) < set(PRESETS["full"]) == set(CATALOGUE)
    table = catalogue_table()
    for s in CATALOGUE.values():
        star = "" if s.name in PRESETS["standard"] else " *"
        assert f"| `{s.name}`{star} | {s.number} |" in table
        assert s.formula
        assert s.source
        assert s.cost


def test_an_unknown_statistic_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match="unknown statistic 'feature_curtosis'; did you mean 'feature_kurtosis'"):
        resolve(["amax", "feature_curtosis"])


def test_a_statistic_given_as_preset_is_told_apart() -> None:
    with pytest.raises(ValueError, match=r"asked for as \['amax'\]"):
        resolve("amax")


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(ValueError, match="the list of statistics is empty"):
        resolve([])
