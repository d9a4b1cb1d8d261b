"""The ground: hooks come off, copies carry nothing of ours, names are the user's, and nothing here imports upwards."""

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.hooks import RemovableHandle

from stabnorm import StabilityMonitor, convert_norms, find_norms, plan_fold
from stabnorm._models.copies import copied
from stabnorm._models.devices import device_of, floating_tensor_of
from stabnorm._models.hooks import Hook, has_forward_hooks, hooked
from stabnorm._models.names import NameFilter
from stabnorm._models.tables import aligned
from stabnorm._models.tree import replace_module
from stabnorm._models.wrappers import is_compiled, parallel_wrapper, plain_name, unwrapped
from stabnorm.switch.progressive import ProgressiveSwitch

# --- hooks ---


def test_hooks_come_off_when_the_body_fails_and_when_a_registration_does() -> None:
    model = nn.Linear(2, 2)

    def registrations(fail: bool) -> Iterator[RemovableHandle]:
        yield model.register_forward_hook(lambda *_: None)
        if fail:
            raise KeyError("the second hook")

    with pytest.raises(KeyError, match="the second hook"), hooked(registrations(fail=True)):
        pass
    assert not model._forward_hooks
    with pytest.raises(TypeError, match="linear"), hooked(registrations(fail=False)):
        model(None)
    assert not model._forward_hooks


class Counting(Hook):
    def __init__(self) -> None:
        self.calls = 0
        self.held = [lambda: None]  # cannot be pickled

    def __call__(self, *_: Any) -> None:
        self.calls += 1


def test_a_hook_of_ours_is_copied_and_pickled_as_one_that_does_nothing() -> None:
    model, hook = nn.Linear(2, 2), Counting()
    model.register_forward_hook(hook)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        made(torch.zeros(1, 2))
        assert not has_forward_hooks(made)
    assert hook.calls == 0
    assert has_forward_hooks(model)


def test_a_copy_carries_the_users_hooks_and_none_of_ours() -> None:
    seen: list[int] = []
    model = nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4))
    model[0].register_forward_hook(lambda *_: seen.append(1))
    with StabilityMonitor(model, companions=["output"]):
        made = copied(model)
    assert type(made[1]) is nn.LayerNorm  # type: ignore[index]
    assert [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in made.modules()] == [0, 1, 0]
    made(torch.zeros(1, 2))
    assert seen == [1]


def test_a_monitor_does_not_keep_a_plan_from_folding() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    with StabilityMonitor(model):
        (norm,) = plan_fold(model, torch.randn(256, 4)).norms
    assert (norm.status, norm.into) == ("forward", ("2",))


def test_a_summary_names_the_users_norm_class_while_a_monitor_watches_it() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
    convert_norms(model)
    switch = ProgressiveSwitch(model, total_steps=100, schedule="adaptive")
    switch.move_to(60)  # nothing was measured by then
    alone = switch.summary()
    assert "keeps LayerNorm" in alone
    with StabilityMonitor(model):
        assert switch.summary() == alone
    switch.close()


# --- names and wrappers ---


def test_names_are_the_users_whatever_wraps_the_modules() -> None:
    model = nn.Sequential(checkpoint_wrapper(nn.Sequential(nn.LayerNorm(4))))
    compiled: Any = torch.compile(model, backend="eager")
    assert [layer.name for layer in find_norms(compiled)] == ["0.0"]
    assert plain_name("_orig_mod._fsdp_wrapped_module.0._checkpoint_wrapped_module.0") == "0.0"
    assert is_compiled(compiled)
    assert unwrapped(compiled) is model


class DistributedDataParallel(nn.parallel.DistributedDataParallel):
    """Without processes."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module


def test_every_wrapper_is_taken_off_in_whatever_order_they_were_put_on() -> None:
    model: Any = nn.Linear(2, 2)
    parallel: Any = DistributedDataParallel
    compiled: Any = torch.compile
    wrapped: Any
    for wrapped in (
        parallel(compiled(model, backend="eager")),
        compiled(parallel(model), backend="eager"),
        compiled(parallel(compiled(model, backend="eager")), backend="eager"),
    ):
        assert unwrapped(wrapped) is model
    assert parallel_wrapper(parallel(model)) == "DistributedDataParallel"
    assert parallel_wrapper(model) is None


def test_a_filter_names_the_argument_that_is_no_regular_expression() -> None:
    with pytest.raises(ValueError, match=r"exclude='\[' is not a valid regular expression"):
        NameFilter("norm", ["head", "["])
    assert not NameFilter(include=[])("norm")


# --- one module in another's place ---


@pytest.mark.parametrize("training", [False, True])
def test_what_takes_a_modules_place_takes_its_mode_and_all_its_places(training: bool) -> None:
    old, new = nn.Linear(2, 2), nn.Dropout(1.0).train(not training)
    inner = nn.Sequential(nn.ReLU(), old)
    model = nn.Sequential(old, inner).train(training)
    replace_module(model, "0", new)
    assert model[0] is inner[1] is new
    assert [module.training for module in model.modules()] == [training] * 4


# --- devices and tables ---


def test_a_models_device_is_that_of_its_first_tensor() -> None:
    meta = nn.BatchNorm1d(2, affine=False, device="meta")
    assert device_of(nn.Identity(), meta, nn.Linear(1, 1)) == torch.device("meta")
    assert device_of(nn.Identity()) == torch.empty(0).device
    assert floating_tensor_of(meta) is meta.running_mean
    assert floating_tensor_of(nn.Identity()).numel() == 0


def test_a_table_has_columns_as_wide_as_their_widest_cell_and_no_trailing_space() -> None:
    assert aligned([("a", "bb", ""), ("ccc", "d", "e")], indent=1) == [" a    bb", " ccc  d   e"]
    assert aligned([]) == []
