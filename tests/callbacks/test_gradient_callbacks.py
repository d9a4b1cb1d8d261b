"""Callbacks on gradients and weights: adaptive clipping, gradient noise, projection; each resumes where it was."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stabnorm import StabNormError
from stabnorm.callbacks import AdaptiveClipCallback, GradientNoiseCallback, ProjectWeightsCallback
from stabnorm.clipping import AdaptiveClip
from stabnorm.gradient_noise import GradientNoise
from stabnorm.remedies import WeightProjection
from tests.lightning_small import fit, module, trainer

CALLBACKS: dict[str, Any] = {
    "clip": lambda: AdaptiveClipCallback(warmup=2, bound=1.01),
    "noise": lambda: GradientNoiseCallback(eta=0.1),
    "projection": lambda: ProjectWeightsCallback(),
}


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_resumed_run_ends_where_one_in_a_single_go_does(name: str, tmp_path: Path) -> None:
    whole, plain, first, second = module(), module(), module(), module()
    fit(trainer(tmp_path, CALLBACKS[name](), max_epochs=2), whole)
    fit(trainer(tmp_path, max_epochs=2), plain)
    assert not all(torch.equal(a, b) for a, b in zip(weights(whole), weights(plain), strict=True))
    run = trainer(tmp_path, CALLBACKS[name](), max_epochs=1)
    fit(run, first)
    run.save_checkpoint(tmp_path / "one.ckpt")
    fit(trainer(tmp_path, CALLBACKS[name](), max_epochs=2), second, ckpt_path=str(tmp_path / "one.ckpt"))
    torch.testing.assert_close(weights(second), weights(whole), rtol=1e-5, atol=1e-6)


def test_the_callback_clips_as_a_plain_loop_does(tmp_path: Path) -> None:
    seen: list[list[torch.Tensor]] = []

    class Looks(AdaptiveClipCallback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            before = [p.grad.clone() for p in pl_module.parameters() if p.grad is not None]
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            seen.append(before)
            seen.append([p.grad.clone() for p in pl_module.parameters() if p.grad is not None])

    fit(trainer(tmp_path, Looks(warmup=2, bound=1.01)), module())
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in seen[0]]
    clip = AdaptiveClip(parameters, warmup=2, bound=1.01)
    changed = 0
    for before, after in zip(seen[::2], seen[1::2], strict=True):
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient.clone()
        clip.step()
        torch.testing.assert_close([p.grad for p in parameters], after)
        changed += not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert changed > 4


def test_the_variance_of_the_noise_follows_its_schedule_and_the_random_state_stays() -> None:
    weight = nn.Parameter(torch.zeros(200, 201))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    noise, state = GradientNoise(optimizer, eta=0.3, gamma=0.55, seed=4), torch.get_rng_state()
    drawn = []
    for _ in range(4):
        weight.grad = torch.full_like(weight, 2.0)
        optimizer.step()
        drawn.append(weight.grad - 2)
    assert torch.equal(torch.get_rng_state(), state)
    for step, values in enumerate(drawn):
        assert float(values.var()) == pytest.approx(0.3 / (1 + step) ** 0.55, rel=0.03)
        assert abs(float(values.mean())) < 5 * math.sqrt(0.3 / values.numel())
    correlation = float((drawn[0] * drawn[1]).mean() / (drawn[0].std() * drawn[1].std()))
    assert abs(correlation) < 0.03
    noise.remove()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert not weight.grad.any()


def test_the_same_seed_gives_the_same_noise_in_another_process_and_another_seed_another(tmp_path: Path) -> None:
    def noise(seed: int) -> torch.Tensor:
        weight = nn.Parameter(torch.zeros(5))
        weight.grad = torch.zeros(5)
        optimizer = torch.optim.SGD([weight], lr=1.0)
        GradientNoise(optimizer, seed=seed)
        optimizer.step()
        return weight.grad

    assert torch.equal(noise(3), noise(3))
    assert not torch.equal(noise(3), noise(4))


def test_the_noise_comes_after_the_trainers_clipping(tmp_path: Path) -> None:
    norms: list[float] = []

    class Looks(GradientNoiseCallback):
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            gradients = [p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]
            norms.extend([float(torch.cat(gradients).norm())] if gradients else [])

    fit(trainer(tmp_path, Looks(eta=1.0), gradient_clip_val=1e-6), module())
    assert min(norms[1:]) > 1.0


def test_weights_keep_their_length_and_a_norm_behind_them_hides_the_projection() -> None:
    """T24: the length to 1e-6, and the output where a LayerNorm follows."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(
        nn.Linear(6, 8, bias=False), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.LayerNorm(8),
        nn.ReLU(), nn.Linear(8, 3),
    ).double()  # fmt: skip
    lengths = [float(model[i].weight.detach().norm()) for i in (0, 3)]
    projection = WeightProjection(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.randn(16, 6, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
        head, x = model[6].weight.detach().clone(), torch.randn(5, 6, dtype=torch.float64)
        before = model(x)
        projection.step()
        torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-3)  # eps of the norms sees the length
        assert torch.equal(model[6].weight, head)
        for length, i in zip(lengths, (0, 3), strict=True):
            assert float(model[i].weight.detach().norm()) == pytest.approx(length, rel=1e-6)


def test_the_callback_keeps_all_lengths_but_the_heads(tmp_path: Path) -> None:
    model, callback = module(), ProjectWeightsCallback()
    fit(trainer(tmp_path, callback), model)
    assert callback.projection is not None
    for name, length in zip(callback.projection.names, callback.projection.lengths, strict=True):
        assert float(model.get_parameter(f"{name}.weight").detach().norm()) == pytest.approx(float(length), rel=1e-5)
    assert len(callback.projection.names) == 2


def test_odd_arguments_are_refused_before_the_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"bound=0\.5"):
        AdaptiveClipCallback(bound=0.5)
    with pytest.raises(ValueError, match="eta=-1"):
        GradientNoiseCallback(eta=-1)
    with pytest.raises(TypeError, match=r"every=1\.5"):
        ProjectWeightsCallback(every=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="matches none of the"):
        fit(trainer(tmp_path, ProjectWeightsCallback(include="nonsense")), module())
    with pytest.raises(StabNormError, match="no linear layers and convolutions"):
        WeightProjection(nn.Sequential(nn.Linear(3, 3)))
