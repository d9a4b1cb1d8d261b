"""UnifiedNorm against its recursion written out, its filter against streams whose truth is known."""

import copy

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stabnorm.functional import geometric_mean, is_burst
from stabnorm.nn import RepBN, UnifiedNorm
from tests.nn_modules import run, state


def published_formula(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    return x * torch.rsqrt(x.square().mean((0, 1)) + eps) * weight + bias


def randomised(norm: UnifiedNorm | RepBN) -> UnifiedNorm | RepBN:
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter, 1.0, 0.3)
    return norm


@pytest.mark.parametrize("steps", [1, 5])
def test_t2_the_warm_up_gradient_is_that_of_the_plain_formula(steps: int) -> None:
    norm = randomised(UnifiedNorm(16, warmup_steps=100))
    weight, bias = (p.detach().clone().requires_grad_() for p in norm.parameters())
    for _ in range(steps):
        x, dy = 3 * torch.randn(4, 32, 16) + 1, torch.randn(4, 32, 16)
        norm.zero_grad()
        y, dx = run(norm, x, dy)
        x.requires_grad_()
        plain = published_formula(x, weight, bias)
        expected = torch.autograd.grad(plain, [x, weight, bias], dy)
        torch.testing.assert_close(y, plain, rtol=1e-6, atol=1e-6)
        for got, want in zip([dx, *(p.grad for p in norm.parameters())], expected, strict=True):
            assert got is not None
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            assert (got - want).norm() < 1e-6 * want.norm()


@pytest.mark.parametrize("masked", [False, True])
def test_the_warm_up_gradient_passes_gradcheck(masked: bool) -> None:
    norm = randomised(UnifiedNorm(5)).double()
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 4) > 0.3 if masked else None

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x, mask))
        return y if mask is None else y[mask]

    assert torch.autograd.gradcheck(function, (x, *norm.parameters()))


@pytest.mark.parametrize("window", [4, (2, 8), (8, 2), (1, 4)], ids=str)
def test_forward_and_backward_follow_the_recursion_written_out(window: int | tuple[int, int]) -> None:
    forwards, backwards = (window, window) if isinstance(window, int) else window
    norm = randomised(UnifiedNorm(8, window, warmup_steps=6, filtration=None))
    weight, bias = (p.detach().double() for p in norm.parameters())
    squares: list[Tensor] = []
    gradients: list[Tensor] = []
    running, average = torch.ones(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    for step in range(30):
        x, dy = (1 + torch.rand(8)) * torch.randn(4, 16, 8), torch.randn(4, 16, 8)
        dy = dy + 0.3 * x  # a gradient that knows the input: psi is not 0
        y, dx = run(norm, x, dy)
        x, dy = x.double(), dy.double()
        smooth = step >= 6 and step >= forwards
        squares.append(x.square().mean((0, 1)))
        square = torch.stack(squares[-forwards:]).log().mean(0).exp() if smooth else squares[-1]
        running = square if step == 0 else 0.9 * running + 0.1 * square
        z = x / (square + 1e-5).sqrt()
        dz = dy * weight
        gradients.append((dz * z).mean((0, 1)))
        entered = torch.stack(gradients[-backwards:]).mean(0) if smooth else gradients[-1]
        average = 0.9 * average + 0.1 * entered
        psi = average if smooth else gradients[-1]
        torch.testing.assert_close(y.double(), z * weight + bias, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dx.double(), (dz - psi * z) / (square + 1e-5).sqrt(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.running_square.double(), running, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.average_gradient.double(), average, rtol=1e-5, atol=1e-5)


def test_a_window_of_one_is_the_plain_norm() -> None:
    norm = randomised(UnifiedNorm(8, window=1, warmup_steps=0))
    weight, bias = norm.parameters()
    for _ in range(6):
        x, dy = torch.randn(4, 16, 8), torch.randn(4, 16, 8)
        y, dx = run(norm, x, dy)
        x.requires_grad_()
        plain = published_formula(x, weight, bias)
        torch.testing.assert_close(y, plain)
        torch.testing.assert_close(dx, torch.autograd.grad(plain, x, dy)[0])


@pytest.mark.parametrize("kind", ["unified", "rep"])
def test_t3_a_skipped_batch_leaves_every_buffer_but_the_counters(kind: str) -> None:
    norm = UnifiedNorm(16, warmup_steps=5) if kind == "unified" else RepBN(16, filtration="calibrated")
    randomised(norm)
    weight, *_ = norm.parameters()
    for _ in range(12):
        run(norm, torch.randn(8, 32, 16), torch.randn(8, 32, 16))
    before = state(norm)
    x, dy = 100 * torch.randn(8, 32, 16), torch.randn(8, 32, 16)
    y, dx = run(norm, x, dy)
    assert norm.skips == 1
    assert norm.step == 13
    for name, value in state(norm).items():
        if name not in ("step", "skips"):
            assert torch.equal(value, before[name]), name
    if kind == "unified":  # normalised by its own statistic, with the exact gradient
        x.requires_grad_()
        plain = published_formula(x, weight, norm.bias)  # type: ignore[arg-type]
        torch.testing.assert_close(y, plain)
        torch.testing.assert_close(dx, torch.autograd.grad(plain, x, dy)[0])


def stream(channels: int, tokens: int, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """Second moments of a stationary stream, and channel scales that spread over more than a decade."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.randn(channels, generator=generator).exp()
    x = torch.randn(steps, tokens, channels, generator=generator) * scales
    return x, scales


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "at_most"), [(8, 0.02), (64, 0.01), (768, 0.01)])
def test_t4_false_positives_on_stationary_streams(channels: int, at_most: float) -> None:
    rates = []
    for seed in range(10):
        norm = UnifiedNorm(channels, warmup_steps=0)
        with torch.no_grad():
            for x in stream(channels, 128, 300, seed)[0]:
                norm(x)
        rates.append(float(norm.skips) / 300)
    assert sum(rates) / len(rates) < at_most, rates


@pytest.mark.slow
@pytest.mark.parametrize("channels", [8, 64, 768])
def test_t4_bursts_of_three_are_found(channels: int) -> None:
    skipped = bursts = 0
    for seed in range(10):
        norm = UnifiedNorm(channels, warmup_steps=0)
        with torch.no_grad():
            for index, x in enumerate(stream(channels, 128, 200, seed)[0]):
                before = norm.skips.clone()
                burst = index >= 20 and index % 10 == 0
                norm(3 * x if burst else x)
                bursts += burst
                skipped += int(burst and norm.skips > before)
    assert skipped > 0.99 * bursts, (skipped, bursts)


@pytest.mark.slow
@pytest.mark.parametrize("window", [4, (1, 4), (8, 2)], ids=str)
def test_batches_that_hardly_differ_are_no_bursts(window: int | tuple[int, int]) -> None:
    # The variance of the window then is 0, or there is none in a window of one, and rounding would decide.
    for seed in range(10):
        torch.manual_seed(seed)
        norm, rep = UnifiedNorm(8, window, warmup_steps=0), RepBN(8, filtration="calibrated")
        x = 10 * torch.rand(8) * torch.randn(64, 8)
        for step in range(60):
            norm(x * (1 + 1e-4 * (step % 7)))
            rep(x)
        assert norm.skips == rep.skips == 0
        norm(3 * x)
        assert norm.skips == (window != (1, 4))


def test_a_channel_below_eps_makes_no_burst() -> None:
    norm = UnifiedNorm(8, warmup_steps=0)
    for step in range(30):
        x = torch.randn(256, 8)
        x[:, 3] *= 1e-3 if step % 10 == 9 else 1e-6
        norm(x)
    assert norm.skips == 0


def test_a_burst_in_few_channels_is_found() -> None:
    norm = UnifiedNorm(768, warmup_steps=0)
    with torch.no_grad():
        for x in stream(768, 128, 30, 0)[0]:
            norm(x)
        before = norm.skips.clone()
        x = torch.randn(128, 768)
        x[:, :16] *= 100
        norm(x)
    assert norm.skips == before + 1


def test_t5_a_window_never_exceeds_the_bound_of_its_own_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (2, 3, 4, 8):
        window = torch.randn(size, 20000, generator=generator, dtype=torch.float64).mul(2).exp()
        gap = window.mean(0) - geometric_mean(window)
        variance = window.sqrt().var(0, correction=0)
        rounding = 1e-12 * window.amax(0)  # with two entries the bounds are one equality
        assert (gap <= size * variance + rounding).all()  # the published criterion, which so never fires
        assert (gap >= size / (size - 1) * variance - rounding).all()
        for channel in window.unbind(1)[: 50 * (size > 2)]:
            assert not is_burst(channel[:, None], channel[:, None], 1e-5)


@pytest.mark.parametrize("sizes", [8, 64])
def test_t28_a_permanent_shift_is_followed_and_bursts_stay_out(sizes: int) -> None:
    norm = UnifiedNorm(sizes, warmup_steps=10)
    torch.manual_seed(0)
    rejected = bursts = 0
    with torch.no_grad():
        for step in range(400):
            scale = 3.0 if step >= 200 else 1.0
            burst = step > 20 and not 200 <= step < 220 and step % 33 == 0
            before = norm.skips.clone()
            y = norm(scale * torch.randn(256, sizes) * (30 if burst else 1))
            skipped = int(norm.skips - before)
            rejected, bursts = rejected + (skipped if burst else 0), bursts + burst
            if step >= 200 + norm.patience + 2 * norm.windows[0] and not burst:
                assert not skipped, step
                torch.testing.assert_close(y.square().mean(0).sqrt(), torch.ones(sizes), rtol=0.25, atol=0)
                assert abs(float(y.square().mean().sqrt()) - 1) < 0.05
    assert rejected == bursts > 8
    torch.testing.assert_close(norm.running_square, torch.full((sizes,), 9.0), rtol=0.15, atol=0)


def test_patience_is_two_windows_unless_given() -> None:
    assert UnifiedNorm(8, 3).patience == 6
    assert UnifiedNorm(8, (5, 2)).patience == 10
    assert UnifiedNorm(8, 3, patience=4).patience == 4


@pytest.mark.parametrize("kind", ["unified", "rep"])
def test_batches_that_are_not_finite_do_not_use_up_the_patience_for_bursts(kind: str) -> None:
    norm = UnifiedNorm(16, warmup_steps=0, patience=8) if kind == "unified" else RepBN(16, filtration="calibrated")
    for _ in range(20):
        norm(torch.randn(64, 16))
    for scale in (float("nan"), 10.0):  # either alone would end the patience of 8
        for _ in range(7):
            norm(scale * torch.randn(64, 16))
    assert norm.skips == 14
    norm(10 * torch.randn(64, 16))
    assert norm.skips == 14  # the eighth burst is the new regime


@pytest.mark.parametrize("kind", ["unified", "rep"])
def test_a_change_of_regime_is_accepted_after_exactly_patience_bursts(kind: str) -> None:
    norm = UnifiedNorm(16, warmup_steps=0, patience=8) if kind == "unified" else RepBN(16, filtration="calibrated")
    randomised(norm)
    for _ in range(20):
        norm(torch.randn(64, 16))
    assert norm.skips == 0
    for burst in (5, 7):  # bursts that end in time are all kept out, and start to be counted anew
        for _ in range(burst):
            norm(10 * torch.randn(64, 16))
        norm(torch.randn(64, 16))
    assert norm.skips == 12
    for step in range(8):
        assert norm.skips == 12 + step
        before = state(norm)
        x, dy = 10 * torch.randn(64, 16), torch.randn(64, 16)
        y, dx = run(norm, x, dy)
    assert norm.skips == 19
    if isinstance(norm, RepBN):
        return
    weight, bias = norm.parameters()
    squares: list[Tensor] = []
    for step in range(4):  # the eighth is the first of a new window: until that is full, each is its own statistic
        squares.append(x.detach().square().mean(0))
        plain = published_formula(x.requires_grad_()[None], weight, bias)[0]
        torch.testing.assert_close(y, plain)
        torch.testing.assert_close(dx, torch.autograd.grad(plain, x, dy)[0])
        if step == 0:
            torch.testing.assert_close(norm.running_square, 0.9 * before["running_square"] + 0.1 * squares[0])
        window = norm.window_square.clone()
        x, dy = 10 * torch.randn(64, 16), torch.randn(64, 16)
        y, dx = run(norm, x, dy)
    torch.testing.assert_close(window, torch.stack(squares))
    squares.append(x.square().mean(0))
    square = geometric_mean(torch.stack(squares[-4:]))
    torch.testing.assert_close(y, x * torch.rsqrt(square + 1e-5) * weight + bias)
    assert norm.skips == 19


def test_a_dead_channel_gives_zeros_and_no_nan() -> None:
    norm = UnifiedNorm(8, warmup_steps=0)
    for _ in range(8):
        x = torch.randn(4, 16, 8)
        x[..., 3] = 0
        y, dx = run(norm, x, torch.randn(4, 16, 8))
        assert torch.equal(y[..., 3], torch.zeros(4, 16))
        assert torch.isfinite(dx).all()
    assert norm.skips == 0
    norm(torch.randn(4, 16, 8))  # the channel comes alive


@pytest.mark.parametrize("warmup", [5, 0])
def test_warming_up_again_keeps_what_eval_divides_by(warmup: int) -> None:
    norm = UnifiedNorm(8, warmup_steps=warmup)
    for _ in range(12):
        run(norm, 2 * torch.randn(4, 16, 8), torch.randn(4, 16, 8))
    running = norm.running_square.clone()
    norm.reset_warmup()
    assert norm.step == 0
    assert torch.equal(norm.running_square, running)
    x, dy = torch.randn(4, 16, 8), torch.randn(4, 16, 8)
    y, _ = run(norm, x, dy)
    z, weight = y / norm.weight.detach(), norm.weight.detach()
    torch.testing.assert_close(norm.average_gradient, 0.1 * (dy * weight * z).mean((0, 1)))
    torch.testing.assert_close(y, published_formula(x, norm.weight, torch.zeros(8)).detach())
    torch.testing.assert_close(norm.running_square, 0.9 * running + 0.1 * x.square().mean((0, 1)))


def test_whoever_drives_the_training_may_write_the_step() -> None:
    norm = UnifiedNorm(8, warmup_steps=5)
    norm.counts_steps = False
    for _ in range(6):
        norm(torch.randn(4, 16, 8))
    assert norm.step == 0
    norm.step.fill_(5)
    x = torch.randn(4, 16, 8)
    assert not torch.allclose(norm(x), published_formula(x, norm.weight, torch.zeros(8)))


def test_two_forwards_before_one_backward() -> None:
    norm = randomised(UnifiedNorm(8, warmup_steps=0))
    for _ in range(6):
        run(norm, torch.randn(4, 16, 8), torch.randn(4, 16, 8))
    other = copy.deepcopy(norm)
    a, b = (torch.randn(4, 16, 8, requires_grad=True) for _ in range(2))
    da, db = torch.randn(4, 16, 8), torch.randn(4, 16, 8)
    y = norm(a), norm(b)
    torch.autograd.backward(y, (da, db))
    assert torch.equal(y[0], other(a))
    assert torch.equal(y[1], other(b))


def test_a_recompute_is_told_by_every_channel() -> None:
    norm = UnifiedNorm(8, warmup_steps=0, filtration=None)

    def batch(scale: float) -> Tensor:
        x = scale * torch.randn(64, 8)
        x[:, 0] = 1000  # a channel of a thousand times the others' size that says nothing about the batch
        return x

    for _ in range(6):
        norm(batch(1.0))
    seen: list[Tensor] = []
    norm.register_forward_hook(lambda module, arguments, y: seen.append(y.detach().clone()))
    inputs = [batch(scale).requires_grad_() for scale in (1.0, 1.3, 1.6)]
    outputs = [checkpoint(lambda x: norm(x).tanh(), x, use_reentrant=False) for x in inputs]
    for y in outputs:
        y.backward(torch.randn_like(y))
    for first, second in zip(seen[:3], seen[3:], strict=True):
        assert torch.equal(first, second)


def test_the_official_variant_is_the_published_module() -> None:
    from stabnorm.nn.official import OfficialUnifiedNorm

    norm = UnifiedNorm(8, (2, 3), warmup_steps=3, filtration="official", variant="official")
    plain = OfficialUnifiedNorm(8, (2, 3), warmup_steps=3, filtration=True)
    for _ in range(8):
        x, dy = torch.randn(4, 6, 8), torch.randn(4, 6, 8)
        for got, want in zip(run(norm, x, dy), run(plain, x, dy), strict=True):
            assert torch.equal(got, want)
    assert [name for name, _ in norm.named_parameters()] == ["weight", "bias"]
    norm.eval()
    scale, shift, _ = norm.fold_affine()
    torch.testing.assert_close(norm(x).double(), x.double() * scale + shift, rtol=1e-5, atol=1e-5)
