"""Which row of a batch an alarm comes from, and which token of it, whatever the layout of batch and model."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional

from stabnorm import StabilityMonitor, valid_tokens
from stabnorm.recorder import BatchRows, FlightRecorder, read_dump, replay
from stabnorm.recorder.row_axis import Rows
from stabnorm.recorder.row_losses import RowLosses
from tests.actions.test_plain_loop import AlarmAt

ROWS, LENGTH, WIDTH = 6, 5, 8
BAD_ROW, BAD_TOKEN = 4, 3


class Net(nn.Module):
    """Tokens [rows, length, width], in whatever order the blocks want them."""

    batch_first = True

    def __init__(self, *, sequence_first: bool = False, flat: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.batch_first, self.flat = not sequence_first, flat
        self.inside, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.last, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.reshape(-1, WIDTH) if self.flat else x
        x = self.inside(x)
        out: Tensor = self.head(self.last(self.norm(x)))
        return out.reshape(*shape[:-1], 3)


def data(*, value: float, rows: tuple[int, ...] = (BAD_ROW,)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, LENGTH, WIDTH, generator=generator)
    for row in rows:
        x[row, BAD_TOKEN] = value * torch.randn(WIDTH, generator=generator) if math.isfinite(value) else value
    return x, torch.randint(3, (ROWS, LENGTH), generator=generator)


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def sequence_first(model: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(model(batch[0].transpose(0, 1)).flatten(0, 1), batch[1].transpose(0, 1).flatten())


def of_a_dict(model: nn.Module, batch: Any) -> Tensor:
    assert len(batch["names"]) == ROWS
    losses = functional.cross_entropy(model(batch["x"] + batch["more"]).movedim(-1, 1), batch["y"], reduction="none")
    return 0.5 * losses.sum() / losses.numel() + 0.1 * (losses * 2).mean()


def dumped(
    folder: Path, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch: Any, masks: Any = (), *,
    known: bool = True, indices: Any = range(100, 100 + ROWS),
) -> tuple[FlightRecorder, Path]:  # fmt: skip
    """A step that is known to be bad before the optimizer, and the dump of it."""
    model.zero_grad()
    with StabilityMonitor(model, ["amax"]) as monitor:
        recorder = FlightRecorder(monitor, folder, loss=loss if known else None, detail_steps=0)
        recorder.begin(batch, indices=indices, masks=masks)
        state = {name: value.nan_to_num() for name, value in model.state_dict().items()}
        numbers = torch.get_rng_state()
        recorder.alarm("non_finite", "it is bad")
        assert torch.equal(numbers, torch.get_rng_state())
        assert all(torch.equal(value.nan_to_num(), state[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
        monitor.step()
        recorder.end()
    return recorder, recorder.dumps[0]


def rows_of(folder: Path, model: nn.Module, loss: Any, batch: Any, masks: Any = (), **options: Any) -> BatchRows:
    """What the dump says, after it was compared with what a replay says."""
    _, dump = dumped(folder, model, loss, batch, masks, **options)
    again = replay(read_dump(dump), model, loss).rows
    assert again is not None
    told = read_dump(dump).header["rows"]
    assert told["sentence"] == again.sentence
    return again


def is_the_bad_one(found: BatchRows) -> None:
    assert found.guilty
    assert [row.row for row in found.rows] == [BAD_ROW]
    assert found.rows[0].token == (BAD_TOKEN,)


LAYOUTS: dict[str, tuple[dict[str, bool], Any, Any]] = {
    "tokens": ({}, cross_entropy, lambda x, y: (x, y)),
    "flattened": ({"flat": True}, cross_entropy, lambda x, y: (x, y)),
    "sequence first inside": ({"sequence_first": True}, sequence_first, lambda x, y: (x, y)),
    "a dict of several inputs": (
        {}, of_a_dict, lambda x, y: {"x": x, "more": torch.zeros(LENGTH, WIDTH), "y": y, "names": list("abcdef")}
    ),
}  # fmt: skip


@pytest.mark.parametrize("value", [300.0, math.nan, math.inf])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_the_row_and_its_token_are_found_in_every_layout(layout: str, value: float, tmp_path: Path) -> None:
    options, loss, batch_of = LAYOUTS[layout]
    found = rows_of(tmp_path, Net(**options), loss, batch_of(*data(value=value)))
    is_the_bad_one(found)
    assert (found.layer, found.count, found.rows[0].sample) == ("norm", ROWS, 100 + BAD_ROW)
    assert f"Row {BAD_ROW} of {ROWS} (sample 104 of the data set) did it: at the input of norm" in found.sentence
    assert f"token {BAD_TOKEN}" in found.sentence
    assert math.isinf(found.rows[0].loss) == (not math.isfinite(value))
    assert math.isfinite(found.without)


def test_batches_that_are_sequence_first_themselves_are_understood(tmp_path: Path) -> None:
    x, y = data(value=300.0)
    batch = (x.transpose(0, 1).contiguous(), y.transpose(0, 1).contiguous())
    found = rows_of(tmp_path, Net(sequence_first=True), cross_entropy, batch, indices=None)
    is_the_bad_one(found)
    assert found.rows[0].sample is None


def test_pictures_have_a_position(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 9, 3))
    x = torch.randn(ROWS, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    x[BAD_ROW, :, 1, 2] *= 500

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return functional.mse_loss(model(batch), torch.zeros(ROWS, 3))

    found = rows_of(tmp_path, model, loss, x)
    assert found.guilty
    assert (found.rows[0].row, found.rows[0].token) == (BAD_ROW, (1, 2))
    assert "at position (1, 2)" in found.sentence


def test_padding_is_nobodys_fault(tmp_path: Path) -> None:
    x, y = data(value=300.0)
    mask = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    mask[1, -1] = False
    x[1, -1] = 1e6  # garbage, which is not valid

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return functional.cross_entropy(model(batch[0])[mask], batch[1][mask])

    found = rows_of(tmp_path, Net(), loss, (x, y), [mask])
    is_the_bad_one(found)
    assert math.isnan(found.rows[0].loss)  # elements that a mask has picked tell nothing of rows


def test_the_share_of_the_loss_adds_up_and_follows_ignored_targets(tmp_path: Path) -> None:
    x, y = data(value=300.0)
    y[:, 0] = -100
    model = Net()
    found = rows_of(tmp_path, model, cross_entropy, (x, y))
    with torch.no_grad():
        losses = functional.cross_entropy(model(x).movedim(-1, 1), y, reduction="none").sum(1)
    assert found.rows[0].loss_share == pytest.approx(float(losses[BAD_ROW] / losses.sum()), rel=1e-4)
    assert f"It has {found.rows[0].loss_share:.0%} of the loss." in found.sentence


def test_a_row_with_a_wrong_target_is_found_by_its_loss(tmp_path: Path) -> None:
    x, _ = data(value=1.0)
    target = torch.zeros(ROWS, LENGTH, 3)
    target[2] = 50.0

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return functional.mse_loss(model(batch[0]), batch[1])

    found = rows_of(tmp_path, Net(), loss, (x, target))
    assert found.guilty
    assert [row.row for row in found.rows] == [2]
    assert found.rows[0].loss_share > 0.9
    assert "by its loss" in found.sentence


def test_several_rows_are_named_the_worst_first(tmp_path: Path) -> None:
    found = rows_of(tmp_path, Net(), cross_entropy, data(value=300.0, rows=(1, BAD_ROW)))
    assert found.guilty
    assert {row.row for row in found.rows} == {1, BAD_ROW}
    assert found.rows[0].largest >= found.rows[1].largest
    assert "Without them the largest is" in found.sentence


def test_weights_that_are_at_fault_accuse_no_row(tmp_path: Path) -> None:
    model = Net()
    with torch.no_grad():
        model.inside.weight.mul_(1000)
    found = rows_of(tmp_path, model, cross_entropy, data(value=1.0))
    assert not found.guilty
    assert "No row stands out" in found.sentence
    with torch.no_grad():
        model.inside.weight[0, 0] = torch.nan
    found = rows_of(tmp_path / "nan", model, cross_entropy, data(value=1.0))
    assert not found.guilty
    assert "Look at the weights" in found.sentence


def test_of_several_ranks_one_batch_does_not_blame_the_weights_alone(tmp_path: Path) -> None:
    model = Net()
    _, folder = dumped(tmp_path, model, cross_entropy, data(value=1.0))
    dump = read_dump(folder)
    again = replay(dataclasses.replace(dump, header={**dump.header, "ranks": 2}), model, cross_entropy)
    assert again.rows is not None
    assert again.rows.sentence.endswith("that of one of 2 ranks, so a row of another one may have done it.")


def test_a_wrong_guess_of_the_rows_accuses_nobody(tmp_path: Path) -> None:
    """Packed tokens have no rows: another row in the batch changes nothing."""
    x = torch.randn(1, ROWS * LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))
    x[0, 7] *= 300

    def loss(model: nn.Module, batch: Any) -> Tensor:
        value: Tensor = model(batch.squeeze(0)).square().mean()
        return value

    found = rows_of(tmp_path, Net(), loss, x)
    assert not found.guilty


def test_micro_batches_are_counted(tmp_path: Path) -> None:
    model = Net()
    with StabilityMonitor(model, ["amax"]) as monitor:
        recorder = FlightRecorder(monitor, tmp_path, loss=cross_entropy, detail_steps=0)
        for value in 1.0, 300.0:
            recorder.begin(data(value=value))
        recorder.alarm("spike", "it is bad")
        monitor.step()
        recorder.end()
    found = replay(read_dump(recorder.dumps[0]), model, cross_entropy).rows
    assert found is not None
    assert (found.rows[0].micro_batch, found.rows[0].row, found.count) == (1, BAD_ROW, 2 * ROWS)
    assert f"Row {BAD_ROW} of micro-batch 1 of {2 * ROWS} did it" in found.sentence


def test_an_alarm_that_comes_late_finds_the_batch_of_its_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    events: list[tuple[str, int, Any]] = []

    class Writer:
        name = "a list"

        def write_block(self, block: Any) -> None: ...

        def write_event(self, kind: str, step: int, data: Any) -> None:
            events.append((kind, step, data))

        def close(self) -> None: ...

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with StabilityMonitor(model, ["amax"], flush_every=5, detector=AlarmAt) as monitor:  # alarms at step 7
        monitor.records.append(Writer())
        recorder = FlightRecorder(monitor, tmp_path, loss=cross_entropy, detail_steps=0)
        for step in range(12):
            batch = data(value=300.0 if step == 7 else 1.0)
            recorder.begin(batch, indices=range(ROWS * step, ROWS * step + ROWS))
            cross_entropy(model, batch).backward()
            optimizer.step()
            monitor.step()
            recorder.end()
            optimizer.zero_grad()
    (rows,) = [data for kind, step, data in events if kind == "rows" and step == 7]
    assert rows["rows"][0]["sample"] == 7 * ROWS + BAD_ROW
    assert "stabnorm, step 7: Row 4 of 6 (sample 46 of the data set) did it" in caplog.text
    dump = read_dump(recorder.dumps[0])
    assert dump.header["step"] == 10
    again = replay(dump, model, cross_entropy)
    assert again.rows is not None
    assert again.rows.step == 7
    is_the_bad_one(again.rows)
    assert "rows of the batch of step 7" in str(again)


@pytest.mark.parametrize("always", [True, False])
@pytest.mark.parametrize("what", ["input", "target"])
def test_rows_that_stand_out_at_every_step_are_not_accused(
    what: str, always: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def loss_of(model: nn.Module, batch: Any) -> Tensor:
        return functional.mse_loss(model(batch[0]), batch[1])

    class Late(AlarmAt):
        step = 38

    model, steps = Net(), 40
    with StabilityMonitor(model, ["amax"], flush_every=steps, detector=Late) as monitor:
        recorder = FlightRecorder(monitor, tmp_path, loss=loss_of, detail_steps=0)
        for step in range(steps):
            hard = always or step == 38
            x, target = data(value=50.0 if hard and what == "input" else 1.0)[0], torch.zeros(ROWS, LENGTH, 3)
            target[BAD_ROW] = 50.0 if hard and what == "target" else 0.0
            recorder.begin((x, target))
            loss = loss_of(model, (x, target))
            loss.backward()
            monitor.step()
            recorder.end(loss)
            model.zero_grad()
    (told,) = [
        record.getMessage() for record in caplog.records if record.getMessage().startswith("stabnorm, step 38: ")
    ]
    assert ("No row stands out" in told) == always
    assert ("Row 4 of 6 did it" in told) != always


def test_batches_that_are_too_large_are_not_kept(tmp_path: Path) -> None:
    with StabilityMonitor(Net(), ["amax"]) as monitor:
        each = sum(t.numel() * t.element_size() for t in data(value=1.0))
        recorder = FlightRecorder(monitor, tmp_path, batch_bytes=3 * each)
        for _ in range(10):
            recorder.begin(data(value=1.0))
            monitor.step()
            recorder.end()
        assert len(recorder._recent) == 3


def test_what_a_worker_of_a_loader_shares_is_copied_so_that_no_open_file_is_kept(tmp_path: Path) -> None:
    with StabilityMonitor(Net(), ["amax"]) as monitor:
        recorder = FlightRecorder(monitor, tmp_path)
        for shared in True, False:
            x = torch.ones(2, LENGTH, WIDTH)
            recorder.begin({"x": x.share_memory_() if shared else x})
            monitor.step()
            recorder.end()
            (kept,) = recorder._recent[-1].batches
            assert not kept["batch"]["x"].is_shared()
            assert (kept["batch"]["x"] is x) == (not shared)


def test_rows_of_zeros_have_no_ratio(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3))
    x, y = torch.zeros(ROWS, LENGTH, WIDTH), torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    x[BAD_ROW, BAD_TOKEN] = 1.0
    _, dump = dumped(tmp_path, model, cross_entropy, (x, y))
    again = replay(read_dump(dump), model, cross_entropy)
    assert again.rows is not None
    is_the_bad_one(again.rows)
    assert "above the median row's 0" in str(again)


def test_samples_that_a_collate_function_has_left_out_are_not_named(tmp_path: Path) -> None:
    found = rows_of(tmp_path, Net(), cross_entropy, data(value=300.0), indices=range(ROWS + 1))
    is_the_bad_one(found)
    assert found.rows[0].sample is None


def test_a_compiled_model_is_run_again_and_not_compiled_again(tmp_path: Path) -> None:
    model, counter = Net(), CompileCounter()
    compiled: Any = torch.compile(model, backend=counter)

    def loss(_: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(compiled, batch)

    with StabilityMonitor(model, ["amax"]) as monitor:
        recorder = FlightRecorder(monitor, tmp_path, loss=loss, detail_steps=0)
        for value in 1.0, 300.0, 1.0:
            recorder.begin(data(value=value))
            loss(model, data(value=value)).backward()
            if value > 1:
                recorder.alarm("spike", "it is bad")
            monitor.step()
            recorder.end()
            model.zero_grad()
    assert read_dump(recorder.dumps[0]).header["rows"]["rows"][0]["row"] == BAD_ROW
    assert counter.frame_count == 1


def test_a_loss_that_fails_ends_no_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def broken(model: nn.Module, batch: Any) -> Tensor:
        raise RuntimeError("no")

    _, dump = dumped(tmp_path, Net(), broken, data(value=300.0))
    assert "rows" not in read_dump(dump).header
    assert "the rows of the batch cannot be compared" in caplog.text


def test_dropout_has_the_same_numbers_in_both_runs(tmp_path: Path) -> None:
    norm = nn.LayerNorm(WIDTH)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5), norm, nn.Dropout(0.5), nn.Linear(WIDTH, 3))
    found = rows_of(tmp_path, model, cross_entropy, data(value=300.0))
    assert found.guilty
    assert found.rows[0].loss_share > 0


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: functional.mse_loss(x, torch.zeros_like(x)),
        lambda x: 3 * functional.smooth_l1_loss(x, torch.zeros_like(x), reduction="sum") + x.square().mean(),
        lambda x: x.square().sum((1, 2)).mean() / 7,
        lambda x: torch.mean(x.square()),
        lambda x: torch.stack([x.square().mean(), functional.l1_loss(x, torch.zeros_like(x))]).mean(),
        lambda x: torch.stack([x[..., :1].square().mean(), x.square().mean(), x.abs().mean(), x.exp().mean()]).sum(),
        lambda x: functional.kl_div(x.log_softmax(-1), torch.full_like(x, 1 / 3), reduction="batchmean"),
        lambda x: functional.binary_cross_entropy_with_logits(x, torch.ones_like(x)),
    ],
)  # fmt: skip
def test_losses_of_rows_add_up_to_the_loss(loss: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with RowLosses() as seen:
        value = loss(x)
    of_rows = seen.of_rows(value, Rows(4))
    assert of_rows is not None
    assert float(of_rows.sum()) == pytest.approx(float(value.detach()), rel=1e-5)
    alone = torch.stack([loss(x[row : row + 1]).detach() for row in range(4)])
    order = of_rows.argsort()
    assert torch.equal(order, alone.argsort()) or torch.allclose(of_rows[order], of_rows[alone.argsort()], rtol=1e-4)


@pytest.mark.parametrize("loss", [lambda x: x.norm(), lambda x: x.mean().exp(), lambda x: x.logsumexp((0, 1, 2))])
def test_a_loss_that_is_no_sum_over_rows_tells_nothing(loss: Callable[[Tensor], Tensor]) -> None:
    x = torch.rand(4, 5, 3).requires_grad_()
    with RowLosses() as seen:
        value = loss(x)
    assert seen.of_rows(value, Rows(4)) is None


def test_masks_that_are_open_in_the_loop_fit_the_run_again(tmp_path: Path) -> None:
    mask = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    with valid_tokens(mask):
        found = rows_of(tmp_path, Net(), cross_entropy, data(value=300.0), [mask])
    is_the_bad_one(found)
