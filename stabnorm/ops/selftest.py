"""Every execution of every op against its formula in float64: `python -m stabnorm.ops.selftest`.

Runs what can run on this machine, in the dtypes and at the sizes of `cases`, twice: the second time must give the same
bits. Kernels that pass on a GPU are recorded (`stabnorm.ops.tested`), and from then on `auto` uses them there. An error
is measured against what the result naturally is, say a sum against the root of its sum of squares, and must stay below
`TOLERANCES`. `tests/ops` holds the same comparisons.

Args: --device cpu|cuda|cuda:N ...; default: all there are.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stabnorm import functional
from stabnorm.functional import COV_XN, MAX, MIN, REST_N, REST_X, SHIFT_N, SHIFT_X, VAR_N, VAR_X, RawMoments
from stabnorm.ops import dispatch, tested
from stabnorm.ops.blend import blend, join_gradients
from stabnorm.ops.blended import blended_gradient, blended_norm, blended_sums
from stabnorm.ops.dispatch import execution, use_kernels
from stabnorm.ops.moments import accumulate_moments_, empty_accounts, merge_accounts
from stabnorm.ops.observed import NormKind, Spec, body_for, observed_norm, splits_for
from stabnorm.ops.one_pass import affine_with_square, gradient_with_sums, redo_affine_, redo_gradient_
from stabnorm.ops.rows import (
    affine_of_rows,
    gradient_of_groups,
    gradient_of_rows,
    moments_of_rows,
    scaled_groups,
    sums_of_rows,
    widened,
)
from stabnorm.ops.running import track_batch_

# The largest error of a statistic, which is float32 whatever the rows are, and of rows in their own dtype.
TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float32: (3e-6, 3e-6),
    torch.bfloat16: (3e-6, 8e-3),
    torch.float16: (3e-6, 1e-3),
}


@dataclass(frozen=True)
class Case:
    """The input of one comparison."""

    name: str
    x: Tensor  # [R, C]
    dy: Tensor
    valid: Tensor | None
    vectors: Tensor  # [6, C], float32: gains, means and the like

    def double(self) -> "Case":
        """In float64, for the truth."""
        return replace(self, x=self.x.double(), dy=self.dy.double(), vectors=self.vectors.double())


# What an op gives, each with its natural size, and whether it is rows in the input's dtype.
Results = dict[str, tuple[Tensor, Tensor | float, bool]]


def cases(device: torch.device | str, *, small: bool = False) -> Iterator[Case]:
    """Sizes around every block, one row, one channel, means far from 0, padding full of NaN; dtypes of `TOLERANCES`."""
    shapes = [(1, 1), (1, 7), (3, 1), (129, 33), (65, 192)]
    shapes += [] if small else [(1366, 384), (20001, 3), (5, 4096), (5, 4100)]
    kinds = [(torch.float32, 0.0, False), (torch.float32, 0.0, True), (torch.float32, 1e4, False)]
    kinds += [(torch.bfloat16, 0.0, False), (torch.bfloat16, 0.0, True), (torch.float16, 0.0, True)]
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    for rows, channels in shapes:
        for dtype, offset, masked in kinds:
            x = (normal(rows, channels) * (normal(channels).abs() + 0.5) + normal(channels) + offset).to(dtype)
            dy, valid = normal(rows, channels).to(dtype), None
            if masked:
                valid = torch.rand(rows, generator=generator) < 0.7
                x[~valid], dy[~valid] = torch.nan, 0
            vectors = normal(6, channels)
            vectors[0] += offset  # the mean
            name = f"{rows} x {channels}, {str(dtype)[6:]}, mean {offset:g}{', masked' if masked else ''}"
            there = None if valid is None else valid.to(device)
            yield Case(name, x.to(device), dy.to(device), there, vectors.to(device))


# --- the ops ---


def _moments(case: Case, kind: functional.Kind) -> Results:
    size, channels = case.x.shape
    if case.x.dtype == torch.float64:
        moments = functional.raw_moments(case.x, kind, 1e-5, normalized=None, valid=case.valid)
    else:
        account = functional.empty_moments(1, channels, case.x.device)
        moments = RawMoments(*(part[0] for part in account))
        half = size // 2  # two forwards, so that they merge
        for x, valid in ((part, None if case.valid is None else case.valid[i]) for i, part in _halves(case.x, half)):
            accumulate_moments_(x, valid, *moments, kind, -1)
    return _of_account(case, moments)


def _of_account(case: Case, moments: RawMoments) -> Results:
    channel, token = moments.channel.double(), moments.token.double()
    largest = case.x.double().nan_to_num(0).abs().amax().clamp(min=1)
    spread = channel[VAR_X].amax().sqrt().clamp(min=1)
    return {
        "seen": (moments.seen.double(), 0.0, False),
        "mean of x": (channel[SHIFT_X] + channel[REST_X], spread, False),
        "mean of n": (channel[SHIFT_N] + channel[REST_N], 1.0, False),
        "variance of x": (channel[VAR_X], spread.square(), False),
        "covariance": (channel[COV_XN], spread, False),
        "variance of n": (channel[VAR_N], 1.0, False),
        "extremes": (channel[[MAX, MIN]], 0.0, False),
        "tokens": (token, spread if largest < 1e3 else spread * 1e2, False),
    }


def _observed(case: Case, kind: NormKind) -> Results:
    """A norm and its moments at once, there and back, in two forwards."""
    _, weight, bias, *_ = (vector.to(case.x.dtype) for vector in case.vectors.unbind())
    bias_ = bias if kind == "layer" else None
    x = case.x.detach().requires_grad_()
    inputs = [x, weight.requires_grad_(), *([] if bias_ is None else [bias_.requires_grad_()])]
    size, channels = x.shape
    spec = Spec(kind, (channels,), 1e-5, True, True)
    outputs = []
    accounts = empty_accounts(1, channels, x.device, splits_for(channels, x.device))
    into = RawMoments(*(part[0] for part in accounts))
    body = body_for(x, weight, bias_, spec, into) if x.dtype != torch.float64 else None
    if body is None:
        y = functional.normalize_tokens(widened(x), kind, 1e-5) * weight
        outputs.append((y if bias_ is None else y + bias_).to(x.dtype))
        found = functional.raw_moments(widened(case.x), kind, 1e-5, valid=case.valid)
    else:
        for i, part in _halves(x, size // 2):
            if part.numel():
                valid = None if case.valid is None else case.valid[i]
                outputs.append(observed_norm(part, weight, bias_, spec, valid, into, body))
        found = RawMoments(*(part[0] for part in merge_accounts(accounts)))
    y = torch.cat(outputs)
    gradients = torch.autograd.grad(y, inputs, case.dy)
    keep = torch.ones_like(x[:, :1], dtype=torch.bool) if case.valid is None else case.valid[:, None]
    natural, dy, width = torch.where(keep, case.x.double(), 0), case.dy.double(), channels**0.5
    spread = natural.var(1, correction=0, keepdim=True).add(1e-5).rsqrt().clamp(min=1) * (1 + natural.abs())
    of_dx = (dy * weight.double()).abs().amax(1, keepdim=True) * spread
    results = _of_account(case, found)
    results["y"] = (torch.where(keep, y.detach(), 0), weight.abs() * width * spread, True)
    results["dx"] = (torch.where(keep, gradients[0], 0), of_dx, True)
    if case.valid is None:  # padding full of NaN is in the gradients of gain and bias
        total = dy.square().sum(0).sqrt() * 10 + 1e-3
        results["gain"] = (gradients[1].float(), total * width * spread.amax(), True)
        if bias_ is not None:
            results["bias"] = (gradients[2].float(), total, True)
    return results


def _splits(case: Case) -> Results:
    """Accounts of two layers, each in as many splits as there are rows; a split of a masked row saw nothing."""
    x = case.x[:200].nan_to_num(0).to(case.vectors.dtype)
    size, channels = x.shape
    parts = functional.empty_moments(2 * size, channels, x.device)
    parts = RawMoments(parts.seen, parts.channel.to(x.dtype), parts.token.to(x.dtype))
    seen = torch.arange(size, device=x.device) % 3 + 1
    parts.seen.copy_((seen if case.valid is None else seen * case.valid[:200]).repeat(2))
    parts.channel[:, SHIFT_X] = x.repeat(2, 1)
    parts.channel[:, VAR_X] = 1
    parts.channel[:, VAR_N] = 2
    parts.token.zero_()
    accounts = RawMoments(*(part.unflatten(0, (2, size)) for part in parts))
    seen, channel, token = merge_accounts(accounts)
    spread = x.abs().amax().clamp(min=1)
    return {
        "seen": (seen.double(), 0.0, False),
        "mean": (channel[:, SHIFT_X].double() + channel[:, REST_X], spread, False),
        "variances": (channel[:, [VAR_X, VAR_N]], spread.square(), False),
        "tokens": (token, 1.0, False),
    }


def _halves(x: Tensor, at: int) -> Iterator[tuple[slice, Tensor]]:
    for part in (slice(0, at), slice(at, None)):
        yield part, x[part]


def _batch(case: Case) -> Results:
    results: Results = {}
    for center in (True, False):
        rows, mean, square = moments_of_rows(case.x, case.valid, center=center)
        results[f"rows, {center}"] = (rows, 0.0, False)
        results[f"square, {center}"] = (square, square.amax(), False)
        if mean is not None:
            results["mean"] = (mean, square.sqrt() + mean.abs() / 10, False)
    return results


def _affine(case: Case) -> Results:
    _, scale, shift, *_ = case.vectors.unbind()
    clean = case.x.nan_to_num(0)
    natural = (clean * scale).abs() + shift.abs()
    return {
        "with shift": (affine_of_rows(clean, scale, shift), natural, True),
        "without": (affine_of_rows(clean, scale, None), natural, True),
    }


def _sums(case: Case) -> Results:
    results: Results = {}
    for mean in (case.vectors[0], None):
        names = ("dy", "dy x", "dy of valid", "dy x of valid")
        sums = sums_of_rows(case.dy, case.x, mean, case.valid)
        x = case.x.double().nan_to_num(0)
        product = case.dy.double() * (x if mean is None else x - mean)
        for name, result in zip(names, sums, strict=True):
            terms = product if "x" in name else case.dy.double()
            results[f"{name}, {mean is not None}"] = (result, terms.square().sum(0).sqrt() + 1e-3, False)
    return results


def _gradient(case: Case) -> Results:
    mean, scale, _, slope, offset, _ = case.vectors.unbind()
    results: Results = {}
    for name, m, o in (("centred", mean, offset), ("not centred", None, None)):
        dx = gradient_of_rows(case.dy, case.x, m, case.valid, scale, slope, o)
        dx = dx if case.valid is None else torch.where(case.valid[:, None], dx, 0)  # padding's: see functional
        natural = (case.dy * scale).abs() + (case.x.nan_to_num(0) * slope).abs() + (mean * slope).abs() + offset.abs()
        results[name] = (dx, natural, True)
    return results


def _track(case: Case) -> Results:
    """Three batches, one of them not finite, as RepBN takes them in: centred or not, moving or plain average."""
    results: Results = {}
    means, squares, device = case.vectors[:3], case.vectors[3:].square(), case.x.device
    for center, momentum in ((True, 0.1), (False, -1.0)):
        running = torch.zeros_like(means[0]), torch.ones_like(means[0])
        step, skips, progress = (torch.zeros(size, dtype=torch.int64, device=device) for size in ((), (), 3))
        for number, (mean, square) in enumerate(zip(means, squares, strict=True)):
            square = torch.where(torch.tensor(number == 1, device=device), torch.nan, square)
            count = torch.full((), 5.0 + number, device=device, dtype=square.dtype)
            mine = (mean, running[0]) if center else (None, None)
            track_batch_(
                mine[0], square, count, mine[1], running[1], None, step, skips, progress, 8, momentum, 1e-5, True
            )
        counters = torch.stack([step, skips, *progress]).double()
        natural = means.abs().amax() + squares.amax() + 1
        results |= {
            f"mean, {center}": (running[0], natural, False),
            f"variance, {center}": (running[1], natural, False),
            f"counters, {center}": (counters, 0.0, False),
        }
    return results


def _one_pass(case: Case) -> Results:
    """Map and sums together; then the maps once more with the flag set, and without."""
    _, scale, shift, slope, *_ = case.vectors.unbind()
    keep = torch.ones_like(case.x[:, :1], dtype=torch.bool) if case.valid is None else case.valid[:, None]
    x, dy = (torch.where(keep, t.double(), 0) for t in (case.x, case.dy))
    y, moments = affine_with_square(case.x, case.valid, scale, shift)
    dx, sums = gradient_with_sums(case.dy, case.x, case.valid, scale, slope)
    results: Results = {"rows": (moments.rows, 0.0, False), "square": (moments.square, moments.square.amax(), False)}
    for name, total, terms in zip(("dy", "dy x", "dy of valid", "dy x of valid"), sums, (dy, dy * x) * 2, strict=True):
        results[name] = (total, terms.square().sum(0).sqrt() + 1e-3, False)
    of_y, of_dx = (x * scale).abs() + shift.abs(), (dy * scale).abs() + (x * slope).abs()
    for name, right in (("as guessed", True), ("done again", False)):
        flag, change = torch.tensor(right, device=x.device), 0 if right else 1
        redo_affine_(y, flag, case.x, scale + change, shift)
        redo_gradient_(dx, flag, case.dy, case.x, case.valid, scale + change, slope)
        results[f"y, {name}"] = (torch.where(keep, y, 0), of_y + x.abs(), True)
        results[f"dx, {name}"] = (torch.where(keep, dx, 0), of_dx + dy.abs(), True)
    return results


def _blend(case: Case, op: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Results:
    clean, results = case.x.nan_to_num(0), Results()
    for lam in (0.0, 0.3, 1.0):
        y = op(torch.tensor(lam, device=clean.device), clean, case.dy)
        results[f"lam {lam}"] = (y, clean.abs() + case.dy.abs(), True)
    return results


def _blended(case: Case, lam_: float) -> Results:
    """Both norms of a PRepBN, there and back, as its autograd function calls them."""
    mean, scale, shift, slope, weight, bias = case.vectors.unbind()
    scale = scale / 4
    lam, natural = torch.tensor(lam_, device=case.x.device), case.x.double().nan_to_num(0)
    body = execution("blended_norm", case.x, case.valid)
    y, *tokens = blended_norm(body, lam, case.x, weight, bias, 1e-5, scale, shift)
    sums = blended_sums(body, lam, case.dy, case.x, mean, case.valid, *tokens)
    dx, of_weight, of_bias = blended_gradient(
        body, lam, case.dy, case.x, weight, bias, scale, mean, case.valid, slope, shift, tokens[0], tokens[1], sums
    )
    keep = torch.ones_like(case.x[:, :1], dtype=torch.bool) if case.valid is None else case.valid[:, None]
    y, dx = (torch.where(keep, t, 0) for t in (y, dx))
    dy, width = case.dy.double(), case.x.shape[1] ** 0.5
    # What ATen's LayerNorm, which runs in some bodies, loses where a token's mean is far above its spread.
    spread = natural.var(1, correction=0, keepdim=True).add(1e-5).rsqrt().clamp(min=1) * (1 + natural.abs())
    total = dy.square().sum(0).sqrt() * 10 + 1e-3
    results: Results = {
        "y": (y, weight.abs() * width * spread + (natural * scale).abs() + shift.abs() + bias.abs(), True)
    }
    if lam_ == 1:  # LayerNorm's own bits from here on, whatever they are worth
        return results
    of_dx = (dy * weight).abs().amax(1, keepdim=True) * spread + ((natural - mean) * slope).abs() + 1
    results["dx"] = (dx, of_dx, True)
    if lam_ > 0 and case.valid is None:  # padding full of NaN is in LayerNorm's own gradient
        results |= {"gain": (of_weight, total * width * spread.amax(), True), "bias": (of_bias, total, True)}
    of_x = (natural - mean).abs().amax() + 1
    for name, found in (("plain", sums.plain_valid), ("weighted", sums.weighted_valid)):
        results[name] = (found, total * of_x, False)
    return results


def _groups(case: Case) -> Results:
    """Where the channels split in three, in three; there and back."""
    groups = 3 if case.x.shape[1] % 3 == 0 else 1
    y, r = scaled_groups(case.x, groups, 1e-5)
    dx = gradient_of_groups(case.dy, case.x, r, case.valid is not None)
    keep = torch.ones_like(case.x[:, :1], dtype=torch.bool) if case.valid is None else case.valid[:, None]
    natural = torch.where(keep, case.x.double(), 0).abs().amax(1, keepdim=True)
    size = (
        case.dy.double().abs().amax(1, keepdim=True)
        * (1 + natural * natural)
        * r.double().nan_to_num(0).amax(1, keepdim=True)
    )
    return {
        "y": (torch.where(keep, y, 0), 1.0, True),
        "r": (torch.where(keep, r, 0), 1.0, False),
        "dx": (torch.where(keep, dx, 0), size, True),
    }


CHECKS: dict[str, tuple[Callable[[Case], Results], ...]] = {
    "accumulate_moments_": (
        lambda case: _moments(case, "layer"),
        lambda case: _moments(case, "rms"),
        lambda case: _moments(case, "batch"),
    ),
    "observed_norm": (lambda case: _observed(case, "layer"), lambda case: _observed(case, "rms")),
    "merge_accounts": (_splits,),
    "moments_of_rows": (_batch,),
    "affine_of_rows": (_affine,),
    "sums_of_rows": (_sums,),
    "gradient_of_rows": (_gradient,),
    "one_pass": (_one_pass,),
    "track_batch_": (_track,),
    "blend": (lambda case: _blend(case, blend),),
    "join_gradients": (lambda case: _blend(case, join_gradients),),
    "blended_norm": tuple(functools.partial(_blended, lam_=lam) for lam in (0.0, 0.3, 1.0)),
    "scale_groups": (_groups,),
}


def truth(op: str, case: Case) -> list[Results]:
    """What the formulas give in float64."""
    with use_kernels(dispatch.REFERENCE):
        return [check(case.double()) for check in CHECKS[op]]


def failures(op: str, setting: str, case: Case, right: list[Results]) -> list[str]:
    """What is wrong with `op` on this case with this setting of `use_kernels`; empty where nothing is."""
    statistic, rows = TOLERANCES[case.x.dtype]
    found = []
    for check, wanted in zip(CHECKS[op], right, strict=True):
        with use_kernels(setting):
            once, again = check(case), check(case)
        for name, (got, _, in_rows) in once.items():
            want, natural, _ = wanted[name]
            want, got, repeated = want.double(), got.double(), again[name][0].double()
            if not torch.equal(got.nan_to_num(0.5), repeated.nan_to_num(0.5)):
                found.append(f"{case.name}, {name}: not the same bits twice")
            allowed = (rows if in_rows else statistic) * (want.abs() + natural)
            error = torch.where(got == want, 0, (got - want).abs())  # the least of no rows is infinite
            if not bool((error <= allowed).all()):
                worst = float((error / allowed.clamp(min=1e-30)).max())
                found.append(f"{case.name}, {name}: {worst:.3g} times the error allowed")
    return found


def executions(op: str, device: torch.device) -> dict[str, str]:
    """The executions of an op that can run on a device: the setting of `use_kernels` by their names."""
    found = {dispatch.REFERENCE: dispatch.REFERENCE}
    for body in dispatch.BODIES[op]:
        setting = "auto" if body.execution == "aten" else body.execution
        if dispatch.why_not(setting, body.execution, op, device.type, device.index) is None:
            found[body.execution] = setting
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print, record; the number of executions that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    parser.add_argument("--device", nargs="+", default=everything)
    failed = 0
    for device in map(torch.device, parser.parse_args(arguments).device):
        passed = []
        for op in CHECKS:
            there = executions(op, device)
            wrong: dict[str, list[str]] = {name: [] for name in there}
            for case in cases(device):
                right = truth(op, case)
                for name, setting in there.items():
                    wrong[name] += failures(op, setting, case, right)
            for name, lines in wrong.items():
                print(f"{device}  {op:20}  {name:9}  {lines[0] if lines else 'passed'}", flush=True)
            failed += sum(map(bool, wrong.values()))
            if "triton" in wrong and not wrong["triton"]:
                passed.append(op)
        if passed:
            print(f"{device}: recorded in {tested.record(device.index, passed)}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
