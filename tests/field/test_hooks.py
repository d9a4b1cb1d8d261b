"""Hooks stop, change and outlive nothing: attaching, copying, exporting, odd forwards and odd backwards."""

import copy
import gc
import logging
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabnorm import StabilityMonitor, fold_norms
from stabnorm.nn import RepBN


def net(norm: nn.Module) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), norm, nn.Linear(8, 1))


def gradient(monitor: StabilityMonitor, name: str = "grad_gain") -> Tensor:
    return monitor.history()[name]


NORMS: dict[str, Callable[[], nn.Module]] = {
    "trained gain": lambda: nn.LayerNorm(8),
    "no gain": lambda: nn.LayerNorm(8, elementwise_affine=False),
    "frozen gain": lambda: nn.LayerNorm(8).requires_grad_(False),
    "frozen gain, trained bias": lambda: _frozen_gain(),
    "rms": lambda: nn.RMSNorm(8),
    "batch": lambda: nn.BatchNorm1d(8, track_running_stats=False),
    "group": lambda: nn.GroupNorm(2, 8, affine=False),
}
of_each_norm = pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)


def _frozen_gain() -> nn.Module:
    norm = nn.LayerNorm(8)
    norm.weight.requires_grad_(False)
    return norm


# --- what a backward adds to gradients, and nothing else, is measured ---


@of_each_norm
@pytest.mark.parametrize("look", ["input", "parameters", "penalty"])
def test_a_gradient_that_is_only_looked_at_does_not_count(make: Callable[[], nn.Module], look: str) -> None:
    measured = []
    for looks in (False, True):
        model, x = net(make()), torch.randn(6, 4, requires_grad=True)
        x.data = torch.linspace(-1, 1, 24).view(6, 4)
        with StabilityMonitor(model) as monitor:
            y = model(x)
            if looks and look != "parameters":
                torch.autograd.grad(100 * y.sum(), x, retain_graph=True, create_graph=look == "penalty")
            elif looks:
                torch.autograd.grad(100 * y.sum(), [*model[2].parameters(), x], retain_graph=True)
            y.square().mean().backward()
            monitor.step()
        measured.append(torch.stack([gradient(monitor), gradient(monitor, "grad_shift")]))
    assert measured[0].isfinite().all() or isinstance(model[1], nn.RMSNorm)
    torch.testing.assert_close(measured[1], measured[0], rtol=0, atol=0, equal_nan=True)


def test_a_backward_into_chosen_leaves_counts() -> None:
    model = net(nn.LayerNorm(8, elementwise_affine=False))
    with StabilityMonitor(model) as monitor:
        model(torch.randn(6, 4)).square().mean().backward(inputs=list(model.parameters()))
        monitor.step()
    assert gradient(monitor).isfinite().all()


@pytest.mark.parametrize("frozen_for_the_generator", [True, False])
@pytest.mark.parametrize("critic_first", [True, False])
def test_the_gradient_of_a_critic_is_what_its_own_optimizer_step_used(
    frozen_for_the_generator: bool, critic_first: bool
) -> None:
    critic, generator = net(nn.LayerNorm(8)), nn.Linear(4, 4)
    optimizer = torch.optim.SGD(critic.parameters(), 0.1)
    x, expected = torch.randn(6, 4), []

    def own() -> None:
        critic.requires_grad_(True)
        optimizer.zero_grad()
        critic(x).square().mean().backward()
        expected.append((critic[1].weight.grad * critic[1].weight).detach().abs().mean() / 12)
        optimizer.step()

    def through() -> None:
        critic.requires_grad_(not frozen_for_the_generator)
        (100 * critic(generator(x)).mean()).backward()

    with StabilityMonitor(critic) as monitor:
        for _ in range(3):
            for part in (own, through) if critic_first else (through, own):
                part()
            monitor.step()
    torch.testing.assert_close(gradient(monitor)[:, 0], torch.stack(expected), rtol=1e-5, atol=0)


def test_a_gain_frozen_or_freed_between_step_and_forward_is_measured_at_once() -> None:
    model, x = net(nn.LayerNorm(8)), torch.randn(6, 4)
    with StabilityMonitor(model) as monitor:
        for trained in (True, False, False, True, True):
            model[1].requires_grad_(trained)
            model(x).square().mean().backward()
            model.zero_grad()
            monitor.step()
    values = gradient(monitor)[:, 0]
    torch.testing.assert_close(values, values[:1].expand(5), rtol=1e-5, atol=0)


@pytest.mark.parametrize("take", ["weight", "both"])
def test_norms_that_share_a_gain_each_have_their_own_gradient(take: str) -> None:
    torch.manual_seed(0)
    first, second = nn.LayerNorm(8), nn.LayerNorm(8)
    second.weight = first.weight
    if take == "both":
        second.bias = first.bias
    model = nn.Sequential(first, nn.Linear(8, 8), second, nn.Linear(8, 1))
    apart = copy.deepcopy(model)
    apart[2].weight, apart[2].bias = nn.Parameter(first.weight.detach().clone()), nn.Parameter(torch.zeros(8))
    x, histories = torch.randn(6, 8), []
    for one in (model, apart):
        with StabilityMonitor(one) as monitor:
            one(x).square().mean().backward()
            monitor.step()
        histories.append(monitor.history())
    for name in ("grad_gain", "grad_shift"):
        torch.testing.assert_close(histories[0][name], histories[1][name], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("optimizer_first", [True, False])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_an_optimizer_step_inside_the_backward_is_measured(optimizer_first: bool, set_to_none: bool) -> None:
    model, plain = net(nn.LayerNorm(8)), net(nn.LayerNorm(8))
    monitor, x = StabilityMonitor(model), torch.randn(6, 4)
    if not optimizer_first:
        monitor.attach()
    for parameter in model.parameters():
        optimizer = torch.optim.SGD([parameter], 0.01)

        def step(_: Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad(set_to_none)

        parameter.register_post_accumulate_grad_hook(step)
    if optimizer_first:
        monitor.attach()
    whole = torch.optim.SGD(plain.parameters(), 0.01)
    with StabilityMonitor(plain) as other:
        for _ in range(3):
            for one, its in ((model, monitor), (plain, other)):
                one(x).square().mean().backward()
                if one is plain:
                    whole.step()
                    whole.zero_grad()
                its.step()
    monitor.detach()
    torch.testing.assert_close(gradient(monitor), gradient(other), rtol=1e-5, atol=0)


def test_a_gradient_that_cannot_be_read_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = net(nn.LayerNorm(8))
    with StabilityMonitor(model) as monitor, caplog.at_level(logging.WARNING):
        hooks: Any = model[1].weight._post_accumulate_grad_hooks
        model[1].weight.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
        (own, _) = list(hooks)
        hooks[own] = hooks.pop(own)
        for _ in range(3):
            model(torch.randn(6, 4)).square().mean().backward()
            monitor.step()
    assert caplog.text.count("norm 1 is not counted: its gradient was taken away inside the backward") == 1


# --- odd forwards ---


@of_each_norm
@pytest.mark.parametrize("preset", ["economy", "standard", "full"])
def test_functional_transforms_run_as_they_do_unwatched(make: Callable[[], nn.Module], preset: str) -> None:
    model, x = net(make()), torch.randn(6, 4)
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(model, parameters, (x.expand(2, 4),))
        return out.square().sum()

    def run() -> list[Tensor]:
        return [*torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x).values()]

    expected = run()
    with StabilityMonitor(model, preset) as monitor:
        found = run()
        monitor.step()
    assert all(map(torch.equal, found, expected))
    assert monitor.history()["tokens"].item() == 0


def test_fast_weights_of_a_functional_call_are_measured_with_their_own_gain() -> None:
    model, x = net(nn.LayerNorm(8)), torch.randn(6, 4)
    parameters = dict(model.named_parameters())
    inner = torch.autograd.grad(model(x).square().mean(), list(parameters.values()), create_graph=True)
    fast = {name: p - 0.5 * g for (name, p), g in zip(parameters.items(), inner, strict=True)}
    gains = [fast["1.weight"]]
    gains[0].retain_grad()
    with StabilityMonitor(model, ["grad_gain"]) as monitor:
        monitor.discard()
        torch.func.functional_call(model, fast, (x,)).square().mean().backward()
        monitor.step()
    assert gains[0].grad is not None
    # The gain of the model itself gets a gradient through the fast one; it is not the gradient at this forward.
    assert gradient(monitor).isfinite().all()


def test_an_instance_norm_of_another_width_does_not_stop_the_backward(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Conv1d(3, 5, 3), nn.InstanceNorm1d(8), nn.Conv1d(5, 1, 3))
    watched = StabilityMonitor(model, "full")
    with watched, caplog.at_level(logging.WARNING), pytest.warns(UserWarning, match="input's size"):
        model(torch.randn(4, 3, 20)).mean().backward()
    assert caplog.text.count("norm 1 is not counted: its input has 5 channels and it was built for 8") == 1


def test_a_gain_of_another_width_does_not_stop_the_backward(caplog: pytest.LogCaptureFixture) -> None:
    model = net(nn.LayerNorm(8))
    with StabilityMonitor(model, "full") as monitor, caplog.at_level(logging.WARNING):
        model[0], model[2], model[1].normalized_shape = nn.Linear(4, 6), nn.Linear(6, 1), (6,)
        model[1].weight, model[1].bias = nn.Parameter(torch.ones(6)), nn.Parameter(torch.zeros(6))
        for _ in range(2):
            model(torch.randn(5, 4)).mean().backward()
            monitor.step()
    assert "its input has 6 channels and it was built for 8" in caplog.text


def test_a_module_in_eval_mode_does_not_count_while_the_model_trains() -> None:
    model: Any = nn.ModuleDict({"teacher": net(nn.BatchNorm1d(8)).eval(), "student": net(nn.BatchNorm1d(8))})
    with StabilityMonitor(model) as monitor:
        for part in model.values():
            part(torch.randn(6, 4)).mean().backward()
        monitor.step()
    assert monitor.history()["tokens"].tolist() == [[0, 6]]
    assert gradient(monitor).isnan().tolist() == [[True, False]]


# --- torch's fused paths, copies, files and exports ---


@pytest.mark.parametrize("companions", [(), ("attention", "output")])
def test_an_encoder_in_eval_mode_keeps_its_fused_path(companions: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(48, 4, 96, batch_first=True)
    teacher = nn.TransformerEncoder(layer, 2).eval()
    model = nn.ModuleDict({"teacher": teacher, "head": nn.Linear(48, 2)}).train()
    teacher.eval()
    x, padding = torch.randn(5, 12, 48), torch.arange(12) >= torch.tensor([12, 3, 7, 9, 12])[:, None]
    with torch.no_grad():
        expected = teacher(x, src_key_padding_mask=padding)
        with StabilityMonitor(model, "full", companions=companions):
            found = teacher(x, src_key_padding_mask=padding)
            torch.backends.mha.set_fastpath_enabled(False)
            try:
                slow = teacher(x, src_key_padding_mask=padding)
            finally:
                torch.backends.mha.set_fastpath_enabled(True)
    assert torch.equal(found, expected)
    assert not torch.equal(found, slow)  # else this test could not fail


@pytest.mark.slow
def test_copies_and_files_of_a_watched_model_are_those_of_an_unwatched_one(tmp_path: Path) -> None:
    norms = nn.LayerNorm(8), nn.GroupNorm(2, 8), nn.LayerNorm(8, elementwise_affine=False)
    model = nn.Sequential(nn.Linear(4, 8), *norms)
    plain = copy.deepcopy(model)
    with StabilityMonitor(model, "full", companions=["output"]):
        averaged = torch.optim.swa_utils.AveragedModel(model).module
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), averaged]
        torch.save(model, tmp_path / "model.pt")
    for one in copies:
        for module, original in zip(one.modules(), plain.modules(), strict=True):
            assert type(module) is type(original)
            assert vars(module).keys() == vars(original).keys()
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
        torch.jit.script(one)
    blocked = (
        "import sys; sys.modules['stabnorm'] = None; import torch; "
        f"print(len(torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)))"
    )
    ran = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, check=False)
    assert ran.stdout.strip() == "4", ran.stderr


def test_copies_of_a_norm_with_hooks_of_its_own_have_no_other_hooks() -> None:
    model, told = net(nn.LayerNorm(8)), []
    model[1].register_forward_pre_hook(lambda *_: told.append("before"))
    model[1].register_forward_hook(lambda *_: told.append("after"))
    tables = [name for name in vars(model[1]) if "_hooks" in name]
    before = [{name: {*vars(module)[name]} for name in tables} for module in model]
    monitors = [StabilityMonitor(model, "full", companions=["output"]), StabilityMonitor(model, "economy")]
    for monitor in monitors:
        monitor.attach()
    copied = copy.deepcopy(model)
    copied(torch.randn(3, 4))
    assert told == ["before", "after"]
    assert [{name: {*vars(module)[name]} for name in tables} for module in copied] == before
    assert [type(module) for module in copied] == [nn.Linear, nn.LayerNorm, nn.Linear]
    assert not any("stabnorm" in name for module in copied for name in vars(module))
    model(torch.randn(3, 4)).mean().backward()
    for monitor in monitors:
        monitor.step()
        monitor.detach()
        assert monitor.history()["tokens"].tolist() == [[3]]
    assert type(model[1]) is nn.LayerNorm
    assert [{name: {*vars(module)[name]} for name in tables} for module in model] == before


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_a_watched_model_is_exported_as_an_unwatched_one(train: bool, fused: bool) -> None:
    model, x = net(nn.LayerNorm(8)).train(train), torch.randn(6, 4)

    def graphs() -> list[str]:
        traced: Any = torch.jit.trace(model, x, check_trace=False)  # the check runs the model once more
        scripted: Any = torch.jit.script(model)
        program = torch.export.export(model, (x,), strict=False)
        return [str(traced.inlined_graph), str(scripted.inlined_graph), str([n.target for n in program.graph.nodes])]

    def parts(graph: str) -> list[str]:  # without names of files and lines
        return [part for part in graph.replace("(", " ").split() if "::" in part]

    expected = graphs()
    with StabilityMonitor(model, "full", companions=["output"], fused=fused) as monitor:
        model(x)
        found = graphs()
        model(x)
        monitor.step()
    assert list(map(parts, found[:2])) == list(map(parts, expected[:2]))
    assert monitor.history()["tokens"].item() == (12 if train else 0)
    if hasattr(torch.compiler, "is_exporting"):
        assert found[2] == expected[2]
    assert "stabnorm" not in found[2]


def test_a_norm_is_folded_while_it_is_watched() -> None:
    model = nn.Sequential(nn.Linear(4, 8), RepBN(8), nn.Linear(8, 2)).eval()
    with StabilityMonitor(model):
        for one in (model, copy.deepcopy(model)):
            assert [norm.status for norm in fold_norms(one, torch.randn(6, 4)).norms] == ["forward"]


def test_a_model_whose_monitor_is_forgotten_is_freed() -> None:
    for stays in (False, True):
        model = net(nn.LayerNorm(8))
        model.append(nn.LayerNorm(1, elementwise_affine=False))
        monitor = StabilityMonitor(model, "full", companions=["output"])
        monitor.attach()
        vars(model)["last"] = model(torch.randn(3, 4))  # as some models keep their output
        model.last.sum().backward()
        monitor.step()
        alive = weakref.ref(model)
        if stays:
            monitor.detach()
        del model, monitor
        gc.collect()
        assert alive() is None


# --- classes that cannot be subclassed ---


class Registering(nn.LayerNorm):
    """Its subclasses are kept in a list, each name once."""

    names: list[str] = []  # noqa: RUF012

    def __init_subclass__(cls) -> None:
        if cls.__name__ in Registering.names:
            raise ValueError(f"{cls.__name__} is registered already")
        Registering.names.append(cls.__name__)


class Registered(Registering):
    pass


class Final(nn.LayerNorm):
    def __init_subclass__(cls) -> None:
        raise TypeError("this class is final")


class _Meta(type):
    made: list[str] = []  # noqa: RUF012

    def __init__(cls, *args: Any) -> None:
        super().__init__(*args)
        _Meta.made.append(cls.__name__)


class OfAMetaclass(nn.LayerNorm, metaclass=_Meta):
    pass


class KeepsItsClass(nn.LayerNorm):
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            raise AttributeError("the class of this module is fixed")
        super().__setattr__(name, value)


class TakesNoHook(nn.LayerNorm):
    def register_forward_pre_hook(self, *_: Any, **__: Any) -> Any:  # type: ignore[override]
        raise RuntimeError("no hooks here")


class TakesNothing(TakesNoHook, KeepsItsClass):
    pass


@pytest.mark.parametrize("kind", [Registered, Final, OfAMetaclass, KeepsItsClass, TakesNoHook])
def test_a_class_that_is_odd_about_subclasses_or_hooks_is_watched(kind: type[nn.LayerNorm]) -> None:
    model, lists = nn.Sequential(nn.LayerNorm(8), kind(8)), ([*Registering.names], [*_Meta.made])
    with StabilityMonitor(model, "full") as monitor:
        model(torch.randn(5, 8)).mean().backward()
        monitor.step()
    assert monitor.history()["tokens"].tolist() == [[5, 5]]
    assert [type(module) for module in model] == [nn.LayerNorm, kind]
    assert (Registering.names, _Meta.made) == lists
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model)


def test_a_norm_that_cannot_be_watched_leaves_nothing_half_attached() -> None:
    model = nn.Sequential(nn.LayerNorm(8), TakesNothing(8), nn.LayerNorm(8))
    before = [{*vars(module)} for module in model]
    with pytest.raises(RuntimeError, match="no hooks here"):
        StabilityMonitor(model).attach()
    assert [type(module) for module in model] == [nn.LayerNorm, TakesNothing, nn.LayerNorm]
    assert [{*vars(module)} for module in model] == before
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())  # type: ignore[attr-defined]


def test_a_companion_that_fails_takes_the_norms_hooks_off() -> None:
    class Head(nn.Linear):
        def register_forward_hook(self, *_: Any, **__: Any) -> Any:  # type: ignore[override]
            raise RuntimeError("no hooks here")

        def __setattr__(self, name: str, value: Any) -> None:
            if name == "__class__":
                raise AttributeError("the class of this module is fixed")
            super().__setattr__(name, value)

    model = nn.Sequential(nn.LayerNorm(8), Head(8, 2))
    monitor = StabilityMonitor(model, companions=["output"])
    with pytest.raises(RuntimeError, match="no hooks here"):
        monitor.attach()
    assert type(model[0]) is nn.LayerNorm
