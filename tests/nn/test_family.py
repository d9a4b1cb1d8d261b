"""What holds for every norm module: state, masks, precision, layouts, copies, errors."""

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stabnorm import StabilityMonitor, find_norms, valid_tokens
from stabnorm.errors import StabNormError
from stabnorm.nn import PowerNorm, PRepBN, RepBN, UnifiedNorm, no_decay_groups
from stabnorm.nn._progressive import ProgressiveNorm
from tests.nn_modules import COUNTERS, HOLDS_A_NORM, MODULES, batches, built, close_states, run, state

every = pytest.mark.parametrize("name", list(MODULES))


def same_state(norm: nn.Module, before: dict[str, Tensor], but: tuple[str, ...] = ()) -> None:
    for name, value in state(norm).items():
        if name in but:
            continue
        was = before[name]
        if but and name.endswith("progress"):
            value, was = value[::2], was[::2]  # the one between counts with the skips
        assert torch.equal(value, was), name


@every
def test_a_nan_batch_changes_nothing_but_the_counters(name: str) -> None:
    for bad in (torch.nan, torch.inf, 1e30):  # the last has no square
        if bad == 1e30 and name == "power, groups":
            continue  # the token's own rms takes it away first
        norm = built(name)
        for warm in range(7):
            before = state(norm)
            x, dy = batches(1, 4, 6, 8, seed=warm)[0]
            x[1, 2, 3] = bad
            run(norm, x, dy)
            same_state(norm, before, COUNTERS)
            run(norm, *batches(1, 4, 6, 8, seed=warm)[0])


@every
def test_nan_upstream_changes_no_backward_state(name: str) -> None:
    norm, other = built(name), None
    for x, dy in batches(6, 4, 6, 8):
        run(norm, x, dy)
    other = copy.deepcopy(norm)
    x, dy = batches(1, 4, 6, 8, seed=9)[0]
    with torch.no_grad():
        other(x)
    run(norm, x, torch.full_like(dy, torch.nan))
    same_state(norm, state(other))


@every
@pytest.mark.parametrize("garbage", [0.0, 1e4, torch.inf, torch.nan])
def test_t6_padding_changes_neither_output_nor_gradient(name: str, garbage: float) -> None:
    norm = built(name)
    padded = copy.deepcopy(norm)
    for x, dy in batches(6, 4, 6, 8):
        mask = torch.ones(4, 9, dtype=torch.bool)
        mask[:, 6:] = False
        tail = torch.full((4, 3, 8), garbage)
        longer, upstream = torch.cat([x, tail], 1), torch.cat([dy, torch.zeros_like(tail)], 1)
        y, dx = run(norm, x, dy)
        y_padded, dx_padded = run(padded, longer, upstream, mask)
        torch.testing.assert_close(y_padded[:, :6], y, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dx_padded[:, :6], dx, rtol=1e-5, atol=1e-5)
        if name not in HOLDS_A_NORM and not name.endswith("groups"):  # layer norm's own gradient of garbage is its own
            assert torch.equal(dx_padded[:, 6:], torch.zeros_like(tail))
    close_states(norm, padded, 1e-5)
    for own, theirs in zip(norm.parameters(), padded.parameters(), strict=True):
        if torch.isfinite(torch.tensor(garbage)) or name not in (*HOLDS_A_NORM, "power, groups"):
            torch.testing.assert_close(own.grad, theirs.grad, rtol=1e-4, atol=1e-4)


@every
def test_the_mask_comes_by_argument_or_by_context(name: str) -> None:
    first = built(name)
    second = copy.deepcopy(first)
    x, dy = batches(1, 4, 6, 8)[0]
    mask = torch.rand(4, 6) > 0.3
    y, dx = run(first, x, dy, mask)
    with valid_tokens(mask):
        y_too, dx_too = run(second, x, dy)
    assert torch.equal(y, y_too)
    assert torch.equal(dx, dx_too)
    same_state(first, state(second))


@every
def test_a_batch_of_padding_alone_is_skipped(name: str) -> None:
    norm = built(name)
    before = state(norm)
    x, dy = batches(1, 4, 6, 8)[0]
    y, dx = run(norm, x, dy, torch.zeros(4, 6, dtype=torch.bool))
    same_state(norm, before, COUNTERS)
    assert torch.isfinite(y).all()
    assert torch.isfinite(dx).all()


@every
@pytest.mark.parametrize("shape", [(4, 8, 5, 3), (4, 8, 15), (60, 8)], ids=str)
def test_channels_first_equals_channels_last(name: str, shape: tuple[int, ...]) -> None:
    last = built(name)
    first = built(name, channel_dim=1)
    first.load_state_dict(last.state_dict())
    for x, dy in batches(5, *shape):
        y, dx = run(first, x, dy)
        y_last, dx_last = run(last, x.movedim(1, -1), dy.movedim(1, -1))
        torch.testing.assert_close(y, y_last.movedim(-1, 1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dx, dx_last.movedim(-1, 1), rtol=1e-5, atol=1e-5)
    close_states(first, last, 1e-5)


@every
@pytest.mark.parametrize("training", [True, False])
def test_channels_first_output_has_the_layout_of_the_input(name: str, training: bool) -> None:
    norm = built(name, channel_dim=1).train(training)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(4, 8, 5, 3).to(memory_format=layout)
        assert norm(x).is_contiguous(memory_format=layout)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_buffers_stay_float32_and_the_output_has_the_inputs_dtype(name: str, dtype: torch.dtype) -> None:
    exact = built(name)
    low = copy.deepcopy(exact).to(dtype)
    for parameter, rounded in zip(exact.parameters(), low.parameters(), strict=True):
        parameter.data.copy_(rounded.data)
    for x, dy in batches(5, 8, 32, 8):
        y, dx = run(low, 100 * x.to(dtype), dy.to(dtype))
        y_exact, _ = run(exact, 100 * x.to(dtype).float(), dy.to(dtype).float())
        assert y.dtype == dx.dtype == dtype
        torch.testing.assert_close(y.float(), y_exact, rtol=3e-2, atol=6e-2)
    for buffer in low.buffers():
        assert buffer.dtype in (torch.float32, torch.int64)
    for key, value in exact.named_buffers():
        if "gradient" not in key and key != "nu":
            torch.testing.assert_close(low.get_buffer(key), value, rtol=2e-2, atol=1e-5, msg=key)


@every
def test_under_autocast_statistics_are_float32(name: str) -> None:
    norm = built(name)
    x, dy = batches(1, 4, 6, 8)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y, dx = run(norm, x.bfloat16(), dy.float() if name in HOLDS_A_NORM else dy.bfloat16())
    assert dx.dtype == torch.bfloat16
    assert y.dtype == torch.bfloat16 or name in HOLDS_A_NORM  # autocast runs layer norm in float32


@every
def test_t7_a_module_used_twice_trains(name: str) -> None:
    norm = built(name)
    x, dy = batches(1, 4, 6, 8)[0]
    x.requires_grad_()
    first = norm(x)
    norm(first).backward(dy)
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


@every
def test_saved_and_loaded_it_continues_to_the_same_numbers(name: str, tmp_path: Path) -> None:
    norm = built(name)
    for x, dy in batches(6, 4, 6, 8):
        run(norm, x, dy)
    torch.save(norm.state_dict(), tmp_path / "state.pt")
    loaded = built(name)
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for x, dy in batches(4, 4, 6, 8, seed=2):
        for got, want in zip(run(loaded, x, dy), run(norm, x, dy), strict=True):
            assert torch.equal(got, want)
    ours = state(loaded)
    for key, value in norm.state_dict().items():
        if key in ours:
            assert torch.equal(ours[key], value), key


@every
def test_copies_and_pickles_are_the_same_module(name: str) -> None:
    norm = built(name)
    for x, dy in batches(6, 4, 6, 8):
        run(norm, x, dy)
    buffer = io.BytesIO()
    torch.save(norm, buffer)
    buffer.seek(0)
    x, dy = batches(1, 4, 6, 8, seed=5)[0]
    twins = copy.deepcopy(norm), pickle.loads(pickle.dumps(norm)), torch.load(buffer, weights_only=False)
    want = run(norm, x, dy)
    for twin in twins:
        assert type(twin) is type(norm)
        for got, expected in zip(run(twin, x, dy), want, strict=True):
            assert torch.equal(got, expected)
        same_state(twin, state(norm))


@every
def test_repr_says_how_it_was_built(name: str) -> None:
    assert "8" in repr(built(name))
    assert "sync=True" in repr(built(name, sync=True))
    assert "channel_dim=1" in repr(built(name, channel_dim=1))


@every
def test_it_starts_again(name: str) -> None:
    norm = MODULES[name](8)
    fresh = {key: value.clone() for key, value in norm.state_dict().items()}
    for x, dy in batches(6, 4, 6, 8):
        run(norm, x + 3, dy)
    norm.reset_parameters()  # type: ignore[operator]
    if isinstance(norm, ProgressiveNorm):
        norm.leave_out_norm = True
        norm.reset_parameters()
        assert (float(norm.lam), norm.leave_out_norm) == (1, False)
        norm.lam.copy_(fresh["lam"])
    for key, value in norm.state_dict().items():
        assert torch.equal(value, fresh[key]), key


@every
def test_eval_is_the_affine_map_it_says(name: str) -> None:
    norm = built(name)
    for x, dy in batches(8, 4, 6, 8):
        run(norm, 3 * x + 1, dy)
    norm.eval()
    if name in (*HOLDS_A_NORM, "power, groups"):
        with pytest.raises(RuntimeError, match=r"lam=0.4|lam=1 |groups=2"):
            norm.fold_affine()  # type: ignore[operator]
        return
    before = state(norm)
    scale, shift, channel_dim = norm.fold_affine()  # type: ignore[operator]
    assert scale.dtype == shift.dtype == torch.float64
    assert channel_dim == -1
    x = batches(1, 4, 6, 8)[0][0]
    torch.testing.assert_close(norm(x).double(), x.double() * scale + shift, rtol=1e-6, atol=1e-6)
    same_state(norm, before)


@every
def test_no_affine_map_comes_of_statistics_that_are_not_finite(name: str) -> None:
    for key in ("running_mean", "running_var", "running_square"):
        norm = built(name)
        if key in state(norm) and name != "power, groups":
            norm.get_buffer(key)[3] = torch.nan
            with pytest.raises(StabNormError, match="non-finite running statistics"):
                norm.fold_affine()  # type: ignore[operator]


@every
def test_find_norms_lists_it_once(name: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), built(name))
    (layer,) = find_norms(model)
    assert layer.name == "1"
    assert layer.num_features == 8
    with StabilityMonitor(model) as monitor:
        model(torch.randn(4, 6, 8)).backward(torch.randn(4, 6, 8))
        monitor.step()
        assert torch.isfinite(monitor.history()["amax"]).all()


@every
def test_clear_errors(name: str) -> None:
    norm = MODULES[name](8)
    with pytest.raises(ValueError, match=r"num_features=8.*\(4, 6, 9\)"):
        (norm.rep if isinstance(norm, ProgressiveNorm) else norm)(torch.randn(4, 6, 9))
    with pytest.raises(ValueError, match=r"mask has shape \(4, 5\).*tokens of shape \(4, 6\)"):
        norm(torch.randn(4, 6, 8), torch.ones(4, 5, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"mask\.bool"):
        norm(torch.randn(4, 6, 8), torch.ones(4, 6))
    with pytest.raises(ValueError, match="channel_dim=0"):
        MODULES[name](8, channel_dim=0)


def test_what_the_constructors_refuse() -> None:
    with pytest.raises(ValueError, match="window=0"):
        UnifiedNorm(8, window=0)
    with pytest.raises(ValueError, match=r"window=0 .* or a pair of such numbers"):
        UnifiedNorm(8, window=(4, 0))
    with pytest.raises(ValueError, match="patience=0"):
        UnifiedNorm(8, patience=0)
    for norm in (UnifiedNorm, RepBN):
        with pytest.raises(ValueError, match="filtration='median' is unknown"):
            norm(8, filtration="median")
        with pytest.raises(ValueError, match="belongs to UnifiedNorm"):
            norm(8, filtration="official")
    with pytest.raises(ValueError, match="variant='paper'"):
        PowerNorm(8, variant="paper")
    with pytest.raises(ValueError, match="groups=3 does not divide"):
        PowerNorm(8, groups=3)
    with pytest.raises(ValueError, match="kind='batch'"):
        PRepBN(8, kind="batch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="eval_mode='norm'"):
        PRepBN(8, eval_mode="norm")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="init='zeros'"):
        RepBN(8, init="zeros")  # type: ignore[arg-type]


def test_eta_and_every_norm_parameter_are_free_of_weight_decay() -> None:
    model = nn.Sequential(nn.Linear(8, 8), PRepBN(8), nn.Linear(8, 8), UnifiedNorm(8))
    decayed, plain = no_decay_groups(model, 0.05)
    assert decayed["weight_decay"] == 0.05
    assert plain["weight_decay"] == 0
    assert {id(p) for p in decayed["params"]} == {id(model[0].weight), id(model[2].weight)}
    assert any(p is model.get_parameter("1.rep.eta") for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))
    torch.optim.AdamW([decayed, plain]).step()


@pytest.mark.parametrize("name", ["unified", "power"])
def test_gradient_statistics_are_free_of_the_loss_scale(name: str) -> None:
    norm = built(name)
    scaled = copy.deepcopy(norm)
    for index, (x, dy) in enumerate(batches(20, 4, 6, 8)):
        scale = 2.0 ** (16 - index)
        scaled.get_buffer("loss_scale").fill_(scale)
        _, dx = run(norm, x, dy)
        _, dx_scaled = run(scaled, x, dy * scale)
        assert torch.equal(dx_scaled / scale, dx)
    for key in ("average_gradient", "nu"):
        if key in state(norm):
            assert torch.equal(state(norm)[key], state(scaled)[key])
