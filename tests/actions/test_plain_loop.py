"""Actions at alarms in a plain loop: each does what it says, and a skipped step leaves everything as it was."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabnorm import StabilityMonitor, StabNormError
from stabnorm.actions import Actions, Clip, HoldSwitch, QKClip, ReduceLR, Rollback, Skip, Training, scale_learning_rates
from stabnorm.clipping import AdaptiveClip
from stabnorm.monitor import Alert
from tests.actions.nets import batches, everything, net, same


class AlarmAt:
    """A detector that raises one alert at a step."""

    step = 7

    def __init__(self, statistics: Any, rows: Any, fading: Any = ()) -> None:
        self.rows = rows

    def update(self, first_step: int, values: Tensor, tokens: Tensor, nonfinite: Tensor) -> list[Alert]:
        at = self.step - first_step
        return [Alert(self.step, self.rows[-1], "amax", 9.0, 1.0, "it is off")] if 0 <= at < len(values) else []

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Loop:
    """A plain loop with actions."""

    def __init__(self, actions: Mapping[str, Any], *, optimizer: str = "AdamW", **training: Any) -> None:
        self.model = net()
        made: Any = getattr(torch.optim, optimizer)
        self.optimizer = made(self.model.parameters(), lr=0.01, **training.pop("options", {}))
        detector = training.pop("detector", None)
        self.monitor = StabilityMonitor(self.model, ["amax"], flush_every=5, detector=detector)
        self.training = Training(self.model, self.monitor, [self.optimizer], **training)
        self.actions = Actions(self.training, actions)
        self.losses: list[float] = []
        self.skipped: list[int] = []

    def run(self, data: list[Tensor], after: Callable[[int], object] = lambda step: None) -> "Loop":
        with self.monitor:
            for step, batch in enumerate(data):
                self.actions.begin_step()
                loss = self.model(batch).square().mean()
                loss.backward()
                if self.actions.skips(self.optimizer, loss=loss):
                    self.skipped.append(step)
                self.optimizer.step()  # which finds no gradients after a skip
                self.monitor.step(loss=loss)
                self.actions.end_step()
                self.optimizer.zero_grad()
                self.losses.append(float(loss.detach()))
                after(step)
        return self


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "RMSprop"])
def test_a_skipped_step_leaves_weights_optimizer_and_norm_buffers_bit_identical(optimizer: str) -> None:
    loop, states = Loop({"non_finite": "skip"}, optimizer=optimizer), list[dict[str, Tensor]]()
    loop.run(batches(8, spoilt=[3]), lambda step: states.append(everything(loop.model, loop.optimizer)))
    assert loop.skipped == [3]
    assert same(states[2], states[3])
    assert not same(states[3], states[4])
    (done,) = loop.actions.done
    assert (done.action, done.why.step, done.why.layer) == ("skip", 3, "1")
    assert all(torch.isfinite(value.float()).all() for value in states[-1].values())


def test_a_training_whose_bad_step_was_skipped_is_the_one_without_it() -> None:
    data = batches(8, spoilt=[3])
    with_it, without = Loop({"non_finite": "skip"}), Loop({})
    for loop in (with_it, without):
        loop.model[5] = nn.Identity()  # dropout draws numbers for a skipped batch, too
    with_it.run(data)
    without.run(data[:3] + data[4:])
    assert with_it.losses[:3] + with_it.losses[4:] == pytest.approx(without.losses, rel=1e-6)


def test_a_bad_loss_or_gradient_is_enough() -> None:
    loop = Loop({"non_finite": "skip"})
    with loop.monitor:
        for number, (bad_loss, bad_gradient) in enumerate([(True, False), (False, True), (False, False)]):
            loop.actions.begin_step()
            loss = loop.model(batches(1)[0]).square().mean()
            loss.backward()
            if bad_gradient:
                weight = loop.model[0].weight
                assert isinstance(weight, Tensor)
                assert weight.grad is not None
                weight.grad[0, 0] = torch.inf
            given = loss * torch.inf if bad_loss else loss
            assert loop.actions.skips(loop.optimizer, loss=given) == (number < 2)
            loop.monitor.step()
            loop.actions.end_step()
    assert [done.why.layer for done in loop.actions.done] == ["", ""]
    assert "the loss is not finite" in loop.actions.done[0].why.reason
    assert "gradients are not finite" in loop.actions.done[1].why.reason


def test_a_budget_ends_endless_skipping_and_says_why() -> None:
    loop = Loop({"non_finite": Skip(budget=3, within=10)})
    with pytest.raises(StabNormError, match=r"4 of the last 10 steps .* budget is 3.*norm '1'"):
        loop.run(batches(9, spoilt=range(2, 9)))
    assert loop.skipped == [2, 3, 4]
    again = Loop({"non_finite": Skip(budget=3, within=10)}).run(batches(50, spoilt=range(0, 50, 10)))
    assert len(again.skipped) == 5


def test_without_an_action_before_the_step_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop({"one_layer": "reduce_lr", "non_finite": ["log", "clip"]})
    monkeypatch.setattr(StabilityMonitor, "verdict_before_step", lambda *_, **__: pytest.fail("it is not needed"))
    loop.run(batches(6))


def test_a_smaller_learning_rate_stays_whatever_schedule_there_is() -> None:
    for make in (
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1.0),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 100),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.01, total_steps=100),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o, [torch.optim.lr_scheduler.ConstantLR(o, 1.0), torch.optim.lr_scheduler.ExponentialLR(o, 1.0)], [40]
        ),
    ):
        rates = []
        for factor in (1.0, 0.25):
            optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.01)
            scheduler = make(optimizer)
            for step in range(60):
                optimizer.step()
                scheduler.step()
                if step == 30:
                    scale_learning_rates([optimizer], factor, [scheduler])
            rates.append(optimizer.param_groups[0]["lr"])
        assert rates[1] == pytest.approx(0.25 * rates[0], rel=1e-6)


def test_an_alarm_reduces_the_learning_rate_so_often_and_no_more() -> None:
    class Often(AlarmAt):
        def update(self, first_step: int, values: Tensor, tokens: Tensor, nonfinite: Tensor) -> list[Alert]:
            return [Alert(first_step, self.rows[0], "amax", 9.0, 1.0, "off")]

    loop = Loop({"one_layer": ReduceLR(0.1, times=2)}, detector=Often).run(batches(315))
    assert loop.optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)
    assert [done.words for done in loop.actions.done][2] == "it is not done any more, because it was done 2 times"
    assert len(loop.actions.done) == 3


def test_clipping_begins_at_an_alarm_and_has_learnt_before() -> None:
    loop = Loop({"one_layer": Clip(steps=3, bound=1.0)}, detector=AlarmAt)
    norms: list[float] = []
    clip = AdaptiveClip.step

    def spoil(self: AdaptiveClip, **options: Any) -> None:
        for parameter in self.parameters:
            if parameter.grad is not None and len(norms) >= 8:
                parameter.grad.mul_(1e6)
        clip(self, **options)
        norms.append(max(float(p.grad.norm()) for p in self.parameters if p.grad is not None))

    loop.actions._workers[Clip(steps=3, bound=1.0)]._clip.warmup = 4  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdaptiveClip, "step", spoil)
        loop.run(batches(15))
    assert max(norms[:8]) < 1e3
    assert min(norms[8:10]) > 1e3  # the alarm came with the flush of step 9
    assert max(norms[10:13]) < 1e3
    assert min(norms[13:]) > 1e3


def test_a_nan_never_enters_the_past_of_a_clip_and_state_resumes() -> None:
    weight = nn.Parameter(torch.zeros(3))
    clip = AdaptiveClip([weight], warmup=2, warmup_norm=None)
    for size in (1.0, 1.0, 1.0, torch.nan, torch.inf, 1000.0):
        weight.grad = torch.full((3,), size)
        clip.step()
    assert weight.grad is not None
    assert float(weight.grad.norm()) == pytest.approx(1.05 * 3**0.5, rel=1e-5)
    other = AdaptiveClip([weight], warmup=2)
    other.load_state_dict(clip.state_dict())
    assert other.past is not None
    assert clip.past is not None
    torch.testing.assert_close(other.past, clip.past)
    with pytest.raises(ValueError, match="the past of 1 parameters, and there are 2"):
        AdaptiveClip([weight, weight]).load_state_dict(clip.state_dict())


def test_clipping_one_tensor_leaves_the_others_alone() -> None:
    good, bad = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    clip = AdaptiveClip([good, bad], warmup=1, warmup_norm=None)
    for size in (1.0, 1.0, 500.0):
        good.grad, bad.grad = torch.ones(3), torch.full((3,), size)
        clip.step()
    assert torch.equal(good.grad, torch.ones(3))  # type: ignore[arg-type]
    assert float(bad.grad.max()) == pytest.approx(1.05, rel=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize("schedule", [False, True])
def test_a_rollback_goes_on_to_the_losses_without_the_bad_data(schedule: bool) -> None:
    """The losses after it are those of a run that saw the data before the state and the data after the alarm."""
    data = batches(20)
    runs: list[Loop] = []
    for detector, seen in ((AlarmAt, data), (None, data[:4] + data[10:])):
        loop = Loop(
            {"one_layer": Rollback(every=4, keep=3, before=2)}, detector=detector, options={"weight_decay": 0.1}
        )
        scheduler = torch.optim.lr_scheduler.ExponentialLR(loop.optimizer, 0.9)
        loop.training.schedulers = [scheduler] if schedule else []
        torch.manual_seed(5)
        runs.append(loop.run(seen, lambda step, s=scheduler: s.step() if schedule else None))  # type: ignore[misc]
    back, straight = runs
    assert [done.action for done in back.actions.done] == ["rollback"]
    assert "what it was after 4 steps; the data of the last 6 steps is left out" in back.actions.done[0].words
    assert back.losses[:4] == straight.losses[:4]
    if not schedule:  # else the schedule has stepped between the state and the end of its step
        assert back.losses[10:] == pytest.approx(straight.losses[4:], rel=1e-6)


def test_a_rollback_has_a_budget_and_needs_a_state_from_before() -> None:
    class Always(AlarmAt):
        def update(self, first_step: int, values: Tensor, tokens: Tensor, nonfinite: Tensor) -> list[Alert]:
            return [Alert(first_step + 1, self.rows[0], "amax", 9.0, 1.0, "off")]

    with pytest.raises(StabNormError, match=r"the 3\. time, and the budget is 2.*largest input"):
        Loop({"one_layer": Rollback(every=1000, budget=2)}, detector=Always).run(batches(30))


def test_a_checkpoint_and_the_end_are_asked_for(tmp_path: Path) -> None:
    saved, reasons = list[Path](), list[str]()
    options: dict[str, Any] = {"directory": tmp_path, "save": saved.append, "stop": reasons.append}
    loop = Loop({"one_layer": "checkpoint", "any": ["stop"]}, detector=AlarmAt, **options).run(batches(12))
    assert saved == [tmp_path / "alarms" / "step10-one_layer.ckpt"]
    assert "Since step 7, one layer" in reasons[0]
    assert [done.action for done in loop.actions.done] == ["checkpoint", "stop"]


def test_an_action_that_fails_ends_no_training(tmp_path: Path) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    loop = Loop({"one_layer": "checkpoint"}, detector=AlarmAt, directory=tmp_path, save=full).run(batches(12))
    assert "it failed, and the training goes on: OSError: [Errno 28]" in loop.actions.done[0].words
    assert len(loop.losses) == 12


@pytest.mark.parametrize(
    ("actions", "words"),
    [
        ({"nonfinite": "skip"}, "did you mean 'non_finite'"),
        ({"non_finite": "skp"}, "did you mean 'skip'"),
        ({"one_layer": "skip"}, "comes too late"),
        ({"any": ["log", "skip"]}, "comes too late"),
        ({"one_layer": "checkpoint"}, r"needs Training\(save="),
        ({"one_layer": "stop"}, r"needs Training\(stop="),
        ({"one_layer": "hold_switch"}, "needs a switch"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_training(actions: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Loop(actions)


@pytest.mark.parametrize("actions", ["skip", {"one_layer": 3}, {"one_layer": [3]}, {"one_layer": Skip}])
def test_what_is_no_action_is_refused(actions: Any) -> None:
    with pytest.raises(TypeError, match="actions"):
        Loop(actions)


def test_a_switch_waits_and_still_ends_in_time() -> None:
    from stabnorm import ProgressiveSwitch
    from stabnorm.nn import PRepBN

    lams = {}
    for held in (False, True):
        model = nn.Sequential(nn.Linear(4, 8), PRepBN(8))
        switch = ProgressiveSwitch(model, 20, "linear", fraction=1.0)
        lam = []
        for step in range(20):
            if held and step == 4:
                switch.hold(5)
            switch.begin()
            lam += switch.lam
            model(torch.randn(8, 4))
            switch.step()
        switch.close()
        lams[held] = [*lam, *switch.lam]
    assert lams[True][:5] == lams[False][:5]
    assert lams[True][4:9] == pytest.approx([lams[True][4]] * 5)
    assert all(one >= other for one, other in zip(lams[True], lams[True][1:], strict=False))
    assert max(a - b for a, b in zip(lams[True], lams[True][1:], strict=False)) < 0.12
    assert lams[True][-1] == lams[False][-1] == 0
    assert HoldSwitch(steps=5).name == "hold_switch"


class OneHead(nn.Module):
    """An attention that says how many heads it has, with a norm before it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        mixed: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return mixed


def test_heads_with_large_logits_are_shrunk_at_an_alarm() -> None:
    class Forgets(AlarmAt):
        forgot = 0

        def forget(self) -> None:
            Forgets.forgot += 1

    model = OneHead()
    with torch.no_grad():
        model.attention.in_proj_weight[:4] *= 500  # queries of the first head
    x = torch.randn(2, 16, 8)
    with StabilityMonitor(model, ["amax"], flush_every=5, detector=Forgets, companions=["attention"]) as monitor:
        actions = Actions(Training(model, monitor, []), {"any": QKClip(threshold=50.0)})
        before = model.attention.in_proj_weight.clone()
        for _ in range(15):
            actions.begin_step()
            model(x)
            monitor.step()
            actions.end_step()
        largest = monitor.companions["attention"].history()["attention_logit_max"]
    assert "attention.head0" in actions.done[0].words
    assert float(largest[9].max()) > 50 >= float(largest[10:].max()) * (1 - 1e-5)
    assert torch.equal(before[4:8], model.attention.in_proj_weight[4:8])
    assert Forgets.forgot == 2  # of norms and attention: that the logits fall now is no alarm


def test_logits_must_be_measured() -> None:
    with pytest.raises(ValueError, match=r"companions=\['attention'\]"):
        Loop({"one_layer": "qk_clip"})
