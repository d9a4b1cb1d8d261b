"""What a monitored step would launch on a GPU: a small model pays by the launch, not by the byte."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from stabnorm import StabilityMonitor
from stabnorm.monitor import bands
from stabnorm.ops import use_kernels

pytest.importorskip("triton")
from tests.monitor.launches import Launches
from tests.triton_kernels import GPU

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(GPU, reason="the launches are counted under Triton's interpreter"),
    pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning"),  # NumPy's, of the interpreter
]
STEP = 7  # launches of a step of layers of one width


def two_widths(width: int) -> nn.Module:
    """Two norms of different widths."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 12), nn.LayerNorm(12), nn.Linear(12, width))


@functools.cache
def counted(depth: int, preset: str, fused: bool, make: Callable[[int], nn.Module] = nn.LayerNorm) -> list[Launches]:
    """The launches of a forward, of its backward, and of `step()`, after a step."""
    model = nn.Sequential(*(make(8) for _ in range(depth)))
    with use_kernels("triton"), StabilityMonitor(model, preset, fused=fused) as monitor:
        model(torch.randn(6, 8)).sum().backward()
        monitor.step()
        model.zero_grad()
        x, y = torch.randn(6, 8), torch.empty(0)
        loss, norm = torch.ones(()), torch.ones(())

        def forward() -> None:
            nonlocal y
            y = model(x)

        def step() -> None:
            monitor.step(loss=loss, learning_rate=0.1, gradient_norm=norm)

        blocks: list[Callable[[], object]] = [forward, lambda: y.backward(torch.ones_like(y)), step]
        counts = []
        for block in blocks:
            with Launches() as launches:
                block()
            counts.append(launches)
    return counts


@pytest.mark.parametrize(("fused", "per_norm"), [(True, 1), (False, 3)])
def test_a_norm_and_its_moments_take_one_launch_or_two_beside_the_norms_own(fused: bool, per_norm: int) -> None:
    (few, *_), (many, *_) = counted(1, "standard", fused), counted(2, "standard", fused)
    assert many.total - few.total <= per_norm, many.names
    assert not many.reads


def test_a_backward_of_the_fused_norm_with_what_it_records_takes_few_launches() -> None:
    (_, few, _), (_, many, _) = counted(1, "standard", True), counted(2, "standard", True)
    assert many.total - few.total <= 4, many.names  # two for the gradients, and one for each recorded parameter
    assert not many.reads


@pytest.mark.parametrize("preset", ["economy", "standard"])
def test_a_step_launches_the_same_number_whatever_the_depth_and_reads_nothing(preset: str) -> None:
    (*_, few), (*_, many) = counted(1, preset, True), counted(2, preset, True)
    assert many.total == few.total, many.names - few.names
    assert not many.reads
    assert many.total <= STEP, many.names


def test_running_buffers_take_two_launches_whatever_the_depth() -> None:
    (*_, few), (*_, many) = (counted(depth, "standard", False, nn.BatchNorm1d) for depth in (1, 2))
    assert many.total == few.total <= STEP + 2, many.names
    assert not many.reads


def test_layers_of_another_width_take_four_launches_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bands, "BAND_COSTS", 0)  # or layers that are as narrow would be measured together
    *_, step = counted(1, "standard", False, two_widths)
    assert step.total <= STEP + 4, step.names
    assert not step.reads


def test_a_step_of_the_full_preset_copies_twice_per_norm_and_reads_nothing() -> None:
    (*_, few), (*_, many) = counted(1, "full", True), counted(2, "full", True)
    assert many.total - few.total <= 2, many.names - few.names
    assert not many.reads
