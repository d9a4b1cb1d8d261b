"""A batch that is finite and far too large is left out before it does harm, and a level that stays is accepted."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from stabnorm import StabilityMonitor, StabNormError
from stabnorm.actions import Actions, Skip, Training
from stabnorm.monitor.spikes import LASTS, Spikes
from tests.actions.nets import everything, net, same, with_a_past

ARMED = 256


def data(steps: int, *, spikes: Sequence[int] = (), factor: float = 1000.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(8, 4, generator=generator) for _ in range(steps)]
    for index in spikes:
        made[index] = made[index] * factor
    return made


class Loop:
    """A plain loop whose micro-batches, optimizers and scaler can be chosen."""

    def __init__(
        self, asked: dict[str, Any], *, optimizers: int = 1, accumulate: int = 1, scaled: bool = False
    ) -> None:
        self.model, self.accumulate = net(), accumulate
        parts = [self.model[:3], self.model[3:]] if optimizers == 2 else [self.model]
        self.optimizers = [torch.optim.AdamW(part.parameters(), lr=0.001) for part in parts]
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100_000) if scaled else None
        self.monitor = StabilityMonitor(self.model, ["amax"], flush_every=100, gradients=False)
        training = Training(self.model, self.monitor, self.optimizers, scaler=self.scaler)
        self.actions = Actions(training, asked)
        self.skipped: list[int] = []
        self.step = 0

    def with_a_past(self) -> "Loop":
        with_a_past(self.monitor, self.optimizers)
        return self

    def everything(self) -> dict[str, Tensor]:
        return everything(self.model, *self.optimizers)

    def one(self, batches: Sequence[Tensor], target: float = 0.0) -> None:
        self.actions.begin_step()
        for batch in batches:
            loss = (self.model(batch) - target).square().mean() / len(batches)
            self.actions.see_loss(loss)
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        skipped = []
        for optimizer in self.optimizers:
            if self.scaler is not None:
                self.scaler.unscale_(optimizer)
            skipped.append(self.actions.skips(optimizer))
            if not skipped[-1]:
                torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
            if self.scaler is None:
                optimizer.step()
            else:
                self.scaler.step(optimizer)
        assert len(set(skipped)) == 1
        if skipped[0]:
            self.skipped.append(self.step)
        if self.scaler is not None:
            self.scaler.update()
        self.monitor.step()
        self.actions.end_step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.step += 1

    def run(self, batches: Sequence[Tensor]) -> "Loop":
        with self.monitor:
            for index in range(0, len(batches), self.accumulate):
                self.one(batches[index : index + self.accumulate])
        return self


CASES: dict[str, dict[str, Any]] = {
    "one": {},
    "accumulation": {"accumulate": 2},
    "two optimizers": {"optimizers": 2},
    "a scaler": {"scaled": True},
}


@pytest.mark.parametrize("case", list(CASES))
def test_a_spike_leaves_weights_optimizer_scaler_and_norm_buffers_bit_identical(case: str) -> None:
    loop = Loop({"spike": "skip"}, **CASES[case]).with_a_past()
    with loop.monitor:
        calm = data(3 * loop.accumulate)
        for index in range(0, len(calm), loop.accumulate):
            loop.one(calm[index : index + loop.accumulate])
        before, scale = loop.everything(), None if loop.scaler is None else loop.scaler.state_dict()
        spiky = data(loop.accumulate, spikes=[loop.accumulate - 1])
        loop.one(spiky)
        assert loop.skipped == [3]
        assert same(before, loop.everything())
        assert loop.scaler is None or loop.scaler.state_dict() == scale
        loop.one(calm[: loop.accumulate])
        assert not same(before, loop.everything())
    (done,) = loop.actions.done
    assert (done.action, done.why.kind, done.why.layer) == ("skip", "spike", "1")
    assert "the largest input of the norm '1' is" in done.why.reason
    assert "its usual" in done.why.reason


@pytest.mark.slow
def test_nothing_is_called_a_spike_in_calm_training_nor_before_there_is_a_past() -> None:
    loop = Loop({"spike": "skip"}).run(data(ARMED + 60, spikes=[100]))
    assert loop.skipped == []


def test_a_loss_or_a_gradient_is_enough() -> None:
    loop = Loop({"spike": "skip"}).with_a_past()
    with loop.monitor:
        loop.one(data(1))
        loop.one(data(1), target=1e4)
    assert loop.skipped == [1]
    assert loop.actions.done[0].why.layer == ""
    assert loop.actions.done[0].why.reason.startswith("the loss is")


def test_the_norm_before_clipping_can_be_given() -> None:
    loop = Loop({"spike": "skip"}).with_a_past()
    monitor, optimizer = loop.monitor, loop.optimizers[0]
    with monitor:
        verdicts = []
        for norm in 0.3, 90.0, 0.3:
            output = loop.model(data(1)[0])
            output.backward(torch.randn_like(output))
            verdicts.append(monitor.verdict_before_step(optimizer, gradient_norm=norm, spikes=True))
            monitor.step()
    assert [verdict.bad for verdict in verdicts] == [False, True, False]
    assert verdicts[1].reason.startswith("the norm of the gradient is 90, ×")


def test_a_level_that_stays_is_accepted_and_said(caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop({"spike": "skip"}).with_a_past().run(data(40, spikes=range(3, 40)))
    assert loop.skipped == list(range(3, 3 + LASTS))
    assert "so many spikes in a row are a new level, which is accepted" in caplog.text


def test_a_budget_ends_endless_skipping_of_spikes() -> None:
    loop = Loop({"spike": Skip(budget=2)}).with_a_past()
    with pytest.raises(StabNormError, match=r"3 of the last 100 steps .* largest input of the norm '1'"):
        loop.run(data(20, spikes=range(3, 20, 2)))
    assert len(loop.skipped) == 2


def test_a_nan_and_then_a_spike_are_both_left_out() -> None:
    loop = Loop({"non_finite": "skip", "spike": "skip"}).with_a_past()
    batches = data(8, spikes=[5])
    batches[4] = torch.full_like(batches[0], torch.nan)
    loop.run(batches)
    assert loop.skipped == [4, 5]
    assert [done.why.kind for done in loop.actions.done] == ["non_finite", "spike"]


def test_a_resumed_run_knows_what_is_usual_and_an_announced_change_forgets_it() -> None:
    calm, spike = data(3), data(1, spikes=[0])
    first = Loop({"spike": "skip"}).with_a_past().run(calm)
    state = first.monitor.state_dict()
    for change, expected in ((False, [0]), (True, [])):
        again = Loop({"spike": "skip"})
        again.monitor.load_state_dict(state)
        if change:
            again.monitor.announce_change("other data")
        again.run(spike)
        assert again.skipped == expected


def test_without_being_asked_for_spikes_are_not_looked_for() -> None:
    loop = Loop({"non_finite": "skip"}).run(data(8, spikes=[3]))
    assert loop.skipped == []
    assert loop.monitor.state_dict()["spikes"]["windows"] == {}


def test_other_actions_may_follow_a_spike() -> None:
    loop = Loop({"spike": "reduce_lr"}).with_a_past().run(data(8, spikes=[3]))
    assert loop.skipped == []
    assert [(done.action, done.why.step) for done in loop.actions.done] == [("reduce_lr", 3)]
    assert loop.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0005)


def test_a_layer_that_starts_late_is_no_spike() -> None:
    spikes = Spikes(["first", "late"])
    for step in range(ARMED + 40):
        assert spikes.judge([], [1.0, 1.0, 2.0, 2000.0 if step > ARMED + 10 else 0.0]) is None
