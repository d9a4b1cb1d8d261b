"""The preset "full": every statistic beyond "standard" against numpy float64 over the whole batch in one go."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stabnorm import StabilityMonitor, find_norms, valid_tokens
from stabnorm.monitor.statistics import PRESETS
from tests.monitor.norm_cases import CASES, Array, normalised, rows

STEPS = 13  # a gradient spike is believed from the eleventh step on
# The step with values of 9e5. They move the mean of their channel by 1e4, around which float32 keeps four decimals of
# the other values; the error of the normalised channel's mean, and so that of `token_cosine`, is of this size there.
OUTLIERS, COARSE = 7, 2e-3
EXTRA = (*(name for name in PRESETS["full"] if name not in PRESETS["standard"]), "switch_readiness")


class Reference:
    """The formulas written out once more, on ``x [tokens, channels]`` of one layer at every step."""

    def __init__(self, eps: float, range_bits: float) -> None:
        self.eps, self.range_bits = eps, range_bits
        self.rows: list[dict[str, float]] = []
        self.mean: Any = None
        self.var: Any = None
        self.gain: Any = None
        self.bias: Any = None
        self.size: Any = None
        self.residual = np.nan
        self.sizes = 0

    def step(
        self, x: Array, sequence: Array, y: Array, n: Array | None, gradient: list[Array], gain: Array | None,
        bias: Array | None, adam: list[tuple[Array, Array, float, float, float]],
    ) -> None:  # fmt: skip
        channels = x.shape[1]
        size, s = np.abs(x), (x**2).mean(0)
        amax, top = size.max(), size.max(0)
        median = np.median(size, 1)
        dims = ((np.abs(y) >= 6).mean(0) >= 0.06).sum()
        out: dict[str, float] = {
            "effective_samples": self.effective_samples(x, sequence),
            "headroom": self.range_bits - np.log2(amax),
            "headroom_fp16": np.log2(65504.0) - np.log2(amax),
            "nonfinite_count": float((~np.isfinite(x)).sum()),
            "zero_share": (x == 0).mean(),
            "depth_ratio": 1.0,
            "channel_spread": amax / np.median(top),
            "massive_activation": min(amax / 100, amax / (1000 * median.mean())),
            "massive_channels": float(((top > 100) & (top >= 1000 * median.mean())).sum()),
            "max_to_median": (size.max(1) / np.maximum(median, np.sqrt(self.eps))).mean(),
            "token_kurtosis": (
                ((x - x.mean(1, keepdims=True)) ** 4).mean(1) / np.maximum(x.var(1), self.eps) ** 2
            ).mean(),
            "outlier_dims": float(dims),
            "outlier_dims_deep": float(dims),
        }
        if self.mean is not None:
            old = set(np.argsort(-(self.var + self.mean**2))[:3].tolist())
            new = set(np.argsort(-s)[:3].tolist())
            out["outlier_overlap"] = len(old & new) / len(old | new)
            before = self.var + self.mean**2
            gained = s / s.sum() - before / before.sum()
            out["new_outlier_share"] = max([0.0, *(gained[c] for c in range(channels) if c not in old)])
        moving = 0.1 if self.mean is not None else 1.0
        self.mean = moving * x.mean(0) + (1 - moving) * (0 if self.mean is None else self.mean)
        self.var = moving * x.var(0) + (1 - moving) * (0 if self.var is None else self.var)
        residual = residual_of(n, x)
        out["token_cosine"] = np.nan if n is None else cosine_of(n)
        self.residual = residual if np.isnan(self.residual) else 0.9 * self.residual + 0.1 * residual
        out["switch_readiness"] = min(max((0.5 - self.residual) / 0.2, 0), 1)
        if self.sizes >= 10:
            out["gradient_spike"] = max(float((np.abs(g) / a).max()) for g, a in zip(gradient, self.size, strict=True))
        self.sizes += 1
        averages = [np.abs(g) for g in gradient]
        if self.size is not None:
            averages = [a + (new - a) / self.sizes for a, new in zip(self.size, averages, strict=True)]
        self.size = averages
        if gain is not None:
            out |= {
                "gain_spread": np.abs(gain).max() / np.median(np.abs(gain)),
                "gain_near_zero": (np.abs(gain) < 1e-3).mean(),
                "dead_gains": (np.abs(gain) < 1e-2).mean(),
                "mx_last_bin": self.last_bin(gain),
            }
            if self.gain is not None:
                out["gain_sign_flips"] = (gain * self.gain < 0).mean()
            self.gain = gain
        if bias is not None:
            if self.bias is not None:
                out["bias_drift"] = np.sqrt(((bias - self.bias) ** 2).mean())
            else:
                self.bias = bias
        if adam:
            g, v = (np.concatenate([part[i] for part in adam]) for i in (0, 1))
            beta, eps, steps = adam[0][2:]
            out["adam_staleness"] = np.sqrt((g**2 / np.maximum(v / (1 - beta**steps), eps**2)).mean())
            out["gradient_to_eps"] = np.sqrt((g**2).mean()) / eps
        self.rows.append(out)

    @staticmethod
    def effective_samples(x: Array, sequence: Array) -> float:
        ids = np.unique(sequence)
        if len(ids) < 2:
            return np.nan
        sums = np.stack([(x[sequence == b] - x.mean(0)).sum(0) for b in ids])
        of_mean = len(ids) / (len(ids) - 1) * (sums**2).sum(0) / len(x) ** 2
        varies = x.var(0) > 0
        return float(1 / (of_mean[varies] / x.var(0)[varies]).mean())

    @staticmethod
    def last_bin(gain: Array) -> float:
        """By rounding to the numbers that E4M3 has."""
        numbers = np.array(sorted({(8 + m) * 2.0**e for e in range(-9, 6) for m in range(8)}))
        numbers = numbers[numbers <= 448]
        shares = []
        for block in (np.abs(gain[i : i + 32]) for i in range(0, len(gain), 32)):
            scaled = block / 2.0 ** (np.floor(np.log2(block.max())) - 8)
            rounded = numbers[np.abs(scaled[:, None] - numbers).argmin(1)]
            shares.append(float((rounded == 448).all()))
        return float(np.mean(shares))

    def history(self) -> dict[str, Array]:
        return {name: np.array([row.get(name, np.nan) for row in self.rows]) for name in EXTRA}


def sequences_of(module: nn.Module, shape: tuple[int, ...]) -> Array:
    """To which entry of the first axis each row belongs."""
    (norm,) = find_norms(nn.Sequential(module))
    unbatched = norm.feature_dims == 1 and norm.channel_dim % len(shape) == 0
    ids = torch.zeros(shape) if unbatched else torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1)).expand(shape)
    return rows(ids, module)[:, 0]


def residual_of(n: Array | None, x: Array) -> float:
    if n is None:
        return 0.0
    dx, dn = x - x.mean(0), n - n.mean(0)
    return float(1 - ((dx * dn).mean(0) ** 2 / ((dx**2).mean(0) * (dn**2).mean(0))).mean())


def cosine_of(n: Array) -> float:
    """Over all pairs of tokens, one by one."""
    products = n @ n.T
    return float(products[~np.eye(len(n), dtype=bool)].mean() / products.diagonal().mean())


def run(
    make: Callable[[], nn.Module], shape: tuple[int, ...], *, offset: float = 0.0, dtype: torch.dtype = torch.float32,
    micro_batches: int = 1, mask: Tensor | None = None,
) -> tuple[dict[str, Tensor], dict[str, Array]]:  # fmt: skip
    """History of a norm in training under "full", and the reference for the same data."""
    module = make().to(dtype)
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -1.5, 1.5)
        parameter.data.view(-1)[:3] = torch.tensor([8.0, -9.0, 5e-4])
    (norm,) = find_norms(nn.Sequential(module))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05, eps=1e-3) if norm.gain is not None else None
    reference = Reference(norm.eps, float(np.log2(torch.finfo(dtype).max)))
    channels = torch.rand(norm.num_features) + 0.5
    channels[1] = 4.0
    along = [1] * len(shape)
    if norm.feature_dims > 1:
        channels = channels.reshape(shape[-norm.feature_dims :])
    else:
        along[norm.channel_dim] = -1
        channels = channels.reshape(along)
    keep = slice(None) if mask is None else mask.flatten().numpy()
    with StabilityMonitor(nn.Sequential(module), "full", flush_every=4, companions=["switch"]) as monitor:
        for step in range(STEPS):
            x = (torch.randn(shape) + 0.5 * torch.randn(channels.shape)) * channels * (
                1 + 0.3 * torch.rand(())
            ) + offset
            x = torch.where(torch.rand(shape) < 0.03, 0, x) if not offset else x
            if step == OUTLIERS:
                x = torch.where(torch.rand(shape) < 2e-3, 9e5 * (1 + torch.rand(shape)), x)
            x, g = x.to(dtype), torch.randn(shape).to(dtype) * (60 if step == 12 else 1)
            if mask is not None:
                spread = mask[..., None, None] if norm.feature_dims > 1 else mask.unsqueeze(norm.channel_dim)
                spoilt, g = torch.where(spread, x, 1e3), torch.where(spread, g, 0)
            outputs = []
            module.zero_grad()
            parts = (t.chunk(micro_batches) for t in (x if mask is None else spoilt, g))
            for part_x, part_g in zip(*parts, strict=True):
                leaf = part_x.clone().requires_grad_()
                if mask is None:
                    outputs.append(module(leaf))
                else:
                    with valid_tokens(mask):
                        outputs.append(module(leaf))
                outputs[-1].backward(part_g)
            y, weight, bias = torch.cat(outputs).detach(), norm.gain_parameter, norm.bias_parameter
            n, _ = normalised(module, x.double())
            if weight is None:
                gradient = [(rows(g, module) * rows(y, module)).sum(0), rows(g, module).sum(0)]
            else:
                assert weight.grad is not None
                gain = weight.detach().double().flatten().numpy()
                gradients = [p.grad for p in (weight, bias) if p is not None and p.grad is not None]
                gradient = [p.double().flatten().numpy() * gain for p in gradients]
            adam: list[Any] = []
            if optimizer is not None:
                optimizer.step()
                adam = [
                    (p.grad.double().flatten().numpy(), optimizer.state[p]["exp_avg_sq"].double().flatten().numpy(),
                     0.999, 1e-3, float(optimizer.state[p]["step"]))
                    for p in (weight, bias) if p is not None and p.grad is not None
                ]  # fmt: skip
            monitor.step(optimizer=optimizer if optimizer is not None else ())
            parameters = [None if p is None else p.detach().double().flatten().numpy() for p in (weight, bias)]
            x_rows = rows(x, module)[keep]
            reference.step(
                x_rows, sequences_of(module, shape)[keep], rows(y, module)[keep],
                None if n is None else rows(n, module)[keep], gradient, parameters[0], parameters[1], adam,
            )  # fmt: skip
    history = monitor.history() | monitor.companions["switch"].history()
    return {name: history[name] for name in EXTRA}, reference.history()


def assert_equals_reference(history: dict[str, Tensor], reference: dict[str, Array]) -> None:
    for name, expected in reference.items():
        got = history[name][:, 0].double().numpy()
        assert np.array_equal(np.isnan(got), np.isnan(expected)), (name, got, expected)
        scale = max(1.0, float(np.nanmax(np.abs(expected), initial=0.0)))  # all are dimensionless
        scale *= 5 if name == "switch_readiness" else 1  # it is five times an affine residual
        error = np.abs(got - expected)
        if name == "token_cosine":
            assert not error[OUTLIERS] > COARSE
            error[OUTLIERS] = 0
        assert np.nanmax(error, initial=0.0) <= 1e-5 * scale, (name, got, expected)


@pytest.mark.parametrize("case", CASES)
def test_every_statistic_equals_float64_in_one_go(case: str) -> None:
    assert_equals_reference(*run(*CASES[case]))


@pytest.mark.parametrize("case", CASES)
def test_every_statistic_equals_float64_at_mean_1e4_and_std_1(case: str) -> None:
    assert_equals_reference(*run(*CASES[case], offset=1e4))


@pytest.mark.parametrize("case", CASES)
def test_every_statistic_equals_float64_in_bfloat16(case: str) -> None:
    assert_equals_reference(*run(*CASES[case], dtype=torch.bfloat16))


@pytest.mark.parametrize(
    "case", ["layer-NLC", "layer-NC", "layer-NCHW", "layer-two-dims", "layer-no-affine", "rms-NLC"]
)
def test_every_statistic_equals_float64_over_the_valid_tokens(case: str) -> None:
    make, shape = CASES[case]
    (norm,) = find_norms(nn.Sequential(make()))
    tokens = (
        shape[: len(shape) - 2]
        if norm.feature_dims > 1
        else [n for i, n in enumerate(shape) if i != norm.channel_dim % len(shape)]
    )
    mask = torch.rand(tuple(tokens)) < 0.7
    assert_equals_reference(*run(make, shape, mask=mask))


@pytest.mark.parametrize("case", [c for c in CASES if not c.startswith(("batch", "group", "instance"))])
def test_accumulation_gives_the_figures_of_one_batch(case: str) -> None:
    histories = []
    for micro_batches in (1, 3):
        torch.manual_seed(1)
        histories.append(run(*CASES[case], micro_batches=micro_batches)[0])
    for name, whole in histories[0].items():
        scale, parts = max(1.0, float(whole.nan_to_num(0).abs().max())), histories[1][name]
        if name == "token_cosine":
            torch.testing.assert_close(parts[OUTLIERS], whole[OUTLIERS], rtol=0, atol=COARSE)
            parts[OUTLIERS] = whole[OUTLIERS]
        torch.testing.assert_close(parts / scale, whole / scale, rtol=0, atol=1e-6, equal_nan=True)
