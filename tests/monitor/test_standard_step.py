"""A step in one pass has the figures of the catalogue, and takes as many operations whatever the depth."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stabnorm import StabilityMonitor, Statistic
from stabnorm.monitor import measure
from stabnorm.monitor.past import CHANNEL_ROWS
from stabnorm.monitor.record import Block
from stabnorm.monitor.standard import STANDARD
from stabnorm.ops import use_kernels
from stabnorm.ops.cpp import build, library
from tests.monitor.test_bands import mixed
from tests.ops.test_layout import enums

pytestmark = pytest.mark.skipif(library.why_not() is not None, reason="there is no C++ compiler")


class Blocks(list[Block]):
    """A record in memory."""

    def write_block(self, block: Block) -> None:
        self.append(block)

    def write_event(self, kind: str, step: int, data: Any) -> None: ...

    def close(self) -> None: ...


class Counting(TorchDispatchMode):
    """Counts ATen operations."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


OWN = Statistic("own", compute=lambda now, past: (now.second_moment - past.var).sum(-1) * now.layout.eps)


def series(preset: str | Sequence[str | Statistic], gradients: bool) -> tuple[dict[str, Any], Any]:
    """What nine steps leave in the record, one of them with a NaN and one with norms that do not run; and the past."""
    net = mixed()
    with use_kernels("cpp"), StabilityMonitor(net, preset, gradients=gradients, flush_every=3) as monitor:
        monitor.records.append(record := Blocks())
        for step in range(9):
            net.zero_grad()
            x = torch.randn(9, 4, generator=torch.Generator().manual_seed(step)) * (30 if step == 4 else 1)
            if step == 6:
                x[2] = torch.nan
            out = net.first(x) if step == 7 else net(x) * torch.arange(54.0).view(9, 6)
            out.square().mean().backward()
            monitor.step()
        monitor.flush()
        state = monitor.state_dict()["past"]
    parts: dict[str, Any] = {
        name: [torch.as_tensor(block.series[name]) for block in record] for name in record[0].series
    }
    blocks = {name: torch.cat(of_blocks) for name, of_blocks in parts.items()}
    known = blocks["top_channel_values"].isfinite()  # of several NaN, any may be the first
    blocks["top_channel_ids"] = torch.where(known, blocks["top_channel_ids"], torch.nan)
    return blocks, state


@pytest.mark.parametrize(
    ("preset", "gradients"),
    [("standard", True), ("standard", False), ("economy", True), ("full", True), (["crest", OWN, "amax"], True)],
)
def test_its_figures_are_those_of_the_catalogue(preset: Any, gradients: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    one_pass, past = series(preset, gradients)
    monkeypatch.setattr(measure, "has_backend", lambda channel: False)
    formula, past_of_formula = series(preset, gradients)
    assert one_pass.keys() == formula.keys()
    for name, values in formula.items():
        torch.testing.assert_close(one_pass[name], values, rtol=3e-6, atol=1e-9, equal_nan=True, msg=name)
    assert past.keys() == past_of_formula.keys()
    for name, values in past_of_formula.items():
        torch.testing.assert_close(past[name], values, rtol=1e-9, atol=1e-12, equal_nan=True, msg=name)


@contextmanager
def steps_of(norms: int, preset: str) -> Iterator[StabilityMonitor]:
    net = nn.Sequential(*(nn.LayerNorm(8) for _ in range(norms)))
    with use_kernels("cpp"), StabilityMonitor(net, preset) as monitor:
        for _ in range(3):
            net(torch.randn(5, 8)).square().sum().backward()
            monitor.step(loss=torch.zeros(()))
        net(torch.randn(5, 8)).square().sum().backward()
        yield monitor


@pytest.mark.parametrize("preset", ["standard", "economy"])
def test_a_step_takes_few_operations_whatever_the_depth(preset: str) -> None:
    counts = []
    for norms in (1, 12):
        with steps_of(norms, preset) as monitor, Counting() as counting:  # type: ignore[no-untyped-call]
            monitor.step()
        counts.append(counting.calls)
    assert counts[0] == counts[1] <= 16


def test_rows_and_columns_are_where_their_names_say() -> None:
    declared = enums((build.FOLDER / "standard.cpp").read_text())
    past = [f"{name}_{i}" if rows > 1 else name for name, rows in CHANNEL_ROWS.items() for i in range(rows)]
    assert [*(name.upper() for name in past), "PAST_ROWS"] in declared
    columns = [name.upper().replace("EPS_SHARE", "SHARE_BELOW_EPS") for name in STANDARD.statistics]
    assert [*columns, "STATISTICS"] in declared
    assert STANDARD.beside_columns == [
        "tokens 0", "nonfinite 0", *(f"top_channel_ids {i}" for i in range(3)),
        *(f"top_channel_values {i}" for i in range(3)),
    ]  # fmt: skip


def test_a_nan_is_the_largest_of_the_top_channels() -> None:
    values = torch.tensor([[1.0, 9.0, torch.nan, 7.0, 8.0]])
    tops: list[Tensor] = []
    for kernels in ("aten", "cpp"):
        net = nn.LayerNorm(5)
        with use_kernels(kernels), StabilityMonitor(net, ["amax"], flush_every=1) as monitor:
            monitor.records.append(record := Blocks())
            net(values)
            monitor.step()
        tops.append(torch.from_numpy(record[0].series["top_channel_ids"]))
    assert tops[0].tolist() == tops[1].tolist() == [[[2, 1, 4]]]
