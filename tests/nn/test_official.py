"""The published modules against what was recorded from them, step by step (tests/golden/README.md)."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stabnorm.nn.official import OfficialPowerNorm, OfficialPRepBN, OfficialRepBN, OfficialUnifiedNorm

GOLDEN = Path(__file__).parents[1] / "golden"
Recording = dict[str, Tensor]


def un(recording: Recording) -> nn.Module:
    window = recording["meta/window" if "meta/window" in recording else "meta/window_fwd"]
    return OfficialUnifiedNorm(
        recording["x"].shape[-1],
        (int(window), int(recording.get("meta/window_bwd", window))),
        int(recording["meta/warmup"]),
        bool(recording["meta/filtration"]),
        1 - float(recording["meta/momentum"]),
        float(recording["meta/eps"]),
    )


def powernorm(recording: Recording) -> nn.Module:
    return OfficialPowerNorm(
        recording["x"].shape[-1],
        int(recording["meta/groups"]),
        int(recording["meta/warmup"]),
        float(recording["meta/alpha_fwd"]),
        float(recording["meta/alpha_bkw"]),
        float(recording["meta/eps"]),
    )


def repbn(recording: Recording) -> nn.Module:
    return OfficialRepBN(recording["x"].shape[-1], float(recording["meta/eps"]), float(recording["meta/momentum"]))


def prepbn(recording: Recording) -> nn.Module:
    return OfficialPRepBN(
        recording["x"].shape[-1],
        int(recording["meta/step"]),
        int(recording["meta/warm"]),
        float(recording["meta/eps"]),
        float(recording["meta/momentum"]),
    )


MODULES: dict[str, Callable[[Recording], nn.Module]] = {
    "un_window4": un,
    "un_window_2_8": un,
    "un_filtration": un,
    "un_long": un,
    "powernorm": powernorm,
    "repbn": repbn,
    "prepbn": prepbn,
}


def recorded(name: str) -> tuple[Recording, nn.Module]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        recording = {key: torch.from_numpy(file[key]) for key in file}
    return recording, MODULES[name](recording)


def under(prefix: str, recording: Recording) -> Recording:
    return {key.removeprefix(prefix): value for key, value in recording.items() if key.startswith(prefix)}


def assert_within(got: Tensor, expected: Tensor, where: str, *, rtol: float = 0.0) -> None:
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=rtol, msg=lambda text: f"{where}: {text}")


def test_every_recording_is_driven() -> None:
    assert {path.stem for path in GOLDEN.glob("*.npz")} == set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_every_recorded_step_is_reproduced_to_1e_5(name: str) -> None:
    recording, module = recorded(name)
    parameters = dict(module.named_parameters())
    for key, start in under("param/", recording).items():
        parameters[key].data.copy_(start)
    for t, (x, grad_y) in enumerate(zip(recording["x"], recording["gy"], strict=True)):
        x = x.clone().requires_grad_()
        module.zero_grad()
        y = module(x)
        y.backward(grad_y)
        assert_within(y, recording["y"][t], f"y at step {t}")
        assert x.grad is not None
        assert_within(x.grad, recording["gx"][t], f"gx at step {t}")
        for key, grads in under("gp/", recording).items():
            grad = parameters[key].grad  # a branch that did not run has none, recorded as 0
            grad = torch.zeros_like(parameters[key]) if grad is None else grad
            assert_within(grad, grads[t], f"gradient of {key} at step {t}")
    for key, value in under("buf/", recording).items():
        assert_within(module.get_buffer(key), value, f"buffer {key} at the end", rtol=1e-5)
    assert_within(module.eval()(recording["eval_x"]), recording["eval_y"], "eval")


@pytest.mark.parametrize("name", MODULES)
def test_a_recorded_state_loads_strictly_and_gives_the_recorded_eval_output(name: str) -> None:
    recording, module = recorded(name)
    module.load_state_dict(under("param/", recording) | under("buf/", recording))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    assert_within(module.eval()(recording["eval_x"]), recording["eval_y"], "eval")
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_the_recordings_reach_filtered_batches_and_the_ratio_of_the_backward() -> None:
    filtered, _ = recorded("un_filtration")
    assert int(filtered["buf/skip_counter"]) == 6  # the two bursts, and the batches around them: D4 and D6 at work
    long, _ = recorded("un_long")
    assert len(long["x"]) > 1000


def test_un_with_a_window_of_one_has_the_exact_gradient_of_its_formula() -> None:
    module = OfficialUnifiedNorm(5, window=1, warmup_steps=3)
    for _ in range(6):
        x, grad_y = torch.randn(4, 7, 5).requires_grad_(), torch.randn(4, 7, 5)
        (got,) = torch.autograd.grad(module(x), x, grad_y)
        plain = x / (x.square().mean((0, 1)) + module.eps).sqrt()
        (exact,) = torch.autograd.grad(plain, x, grad_y)
        assert_within(got, exact, "gx")


def test_un_in_warm_up_has_another_gradient_than_its_formula() -> None:
    module = OfficialUnifiedNorm(5)
    x = torch.randn(4, 7, 5).requires_grad_()
    grad_y = x.detach() + torch.randn(4, 7, 5)
    (got,) = torch.autograd.grad(module(x), x, grad_y)
    (exact,) = torch.autograd.grad(x / (x.square().mean((0, 1)) + module.eps).sqrt(), x, grad_y)
    assert (got - exact).norm() > 0.2 * exact.norm()  # D7


MASK = torch.arange(6) < torch.tensor([[6], [4], [2]])


@pytest.mark.parametrize("make", [OfficialUnifiedNorm, OfficialPowerNorm, OfficialRepBN, OfficialPRepBN])
def test_padding_changes_no_valid_output(make: Callable[[int], nn.Module]) -> None:
    x, module, other = torch.randn(3, 6, 4), make(4), make(4)
    for _ in range(2):
        padded = torch.where(MASK[..., None], x, 7.0)
        assert torch.equal(module(x, MASK)[MASK], other(padded, MASK)[MASK])


def test_un_gives_padding_a_gradient_that_nothing_downstream_asked_for() -> None:
    x = torch.randn(3, 6, 4).requires_grad_()
    (grad_x,) = torch.autograd.grad(OfficialUnifiedNorm(4)(x, MASK), x, torch.randn(3, 6, 4) * MASK[..., None])
    assert bool((grad_x[~MASK] != 0).all())  # D10


def test_repbn_lets_padding_pass_as_one_plus_eta_times_itself() -> None:
    x, module = torch.randn(3, 6, 4), OfficialRepBN(4)
    nn.init.constant_(module.alpha, 0.5)
    assert_within(module(x, MASK)[~MASK], 1.5 * x[~MASK], "padding")  # P5


@pytest.mark.parametrize("make", [OfficialUnifiedNorm, OfficialPowerNorm, OfficialRepBN, OfficialPRepBN])
def test_two_forwards_before_one_backward_do_not_fail(make: Callable[[int], nn.Module]) -> None:
    module, x = make(4), torch.randn(3, 6, 4).requires_grad_()
    (module(x) + module(x)).backward(torch.randn(3, 6, 4))
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


@pytest.mark.parametrize("make", [OfficialUnifiedNorm, OfficialPowerNorm])
def test_bfloat16_input_leaves_as_float32_because_the_parameters_are(make: Callable[[int], nn.Module]) -> None:
    x = torch.randn(3, 6, 4, dtype=torch.bfloat16).requires_grad_()
    y = make(4)(x)
    y.backward(torch.randn_like(y))
    assert y.dtype == torch.float32  # D14
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16


def test_un_without_warm_up_uses_batch_statistics_until_its_window_is_full() -> None:
    module = OfficialUnifiedNorm(4, window=3, warmup_steps=0)
    for step in range(1, 6):
        x = torch.randn(3, 6, 4) * step
        own = x / (x.square().mean((0, 1)) + module.eps).sqrt()
        assert torch.allclose(module(x), own, atol=1e-5) == (step <= 3)


def test_prepbn_in_eval_is_repbn_whatever_the_schedule_says() -> None:
    x, module = torch.randn(3, 6, 4), OfficialPRepBN(4, total_steps=10)
    module(x)
    assert module.lam == 0.9
    assert torch.equal(module.eval()(x), module.norm2(x))  # P7
    assert module.lam == 0.9
