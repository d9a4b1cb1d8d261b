"""A repair by a Lightning Trainer is the plain loop's, resumes, and runs in both namespaces."""

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from stabnorm.callbacks import repair_module
from stabnorm.pretrained import Recipe, Repair, repair_norms
from tests.pretrained.nets import batches
from tests.pretrained.test_repair import fitted

pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`",
)
STEPS = 8


def trainer(root: Path, namespace: str = "pytorch_lightning", **options: Any) -> Any:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    module = importlib.import_module(namespace)
    options = {"max_steps": STEPS, "enable_checkpointing": False} | options
    return module.Trainer(accelerator="cpu", default_root_dir=root, **quiet, **options)


def loader() -> DataLoader[Any]:
    return DataLoader(batches(), batch_size=None)  # type: ignore[arg-type]


def same(one: nn.Module, two: nn.Module) -> bool:
    state = two.state_dict()
    return all(torch.equal(value, state[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("namespace", ["pytorch_lightning", "lightning.pytorch"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_trainer_does_what_the_plain_loop_does(namespace: str, accumulate: int, tmp_path: Path) -> None:
    original, model = fitted()
    plain = copy.deepcopy(model)
    recipe = Recipe(homotopy=0.5, accumulate=accumulate)
    repair_norms(Repair(plain, original, STEPS, recipe), batches())
    base = importlib.import_module(namespace).LightningModule
    repair = Repair(model, original, STEPS, Recipe(homotopy=0.5))
    trainer(tmp_path, namespace, accumulate_grad_batches=accumulate).fit(repair_module(repair, base), loader())
    assert repair.steps_done == STEPS
    assert all(norm.lam == 0 for norm in repair.norms.values())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-5, atol=1e-6, msg=name)


def test_a_resumed_fit_ends_at_the_same_bits_and_the_checkpoint_has_no_original(tmp_path: Path) -> None:
    original, model = fitted()
    whole, first, second = (copy.deepcopy(model) for _ in range(3))
    trainer(tmp_path).fit(repair_module(Repair(whole, original, STEPS)), loader())

    checkpoint = importlib.import_module("pytorch_lightning.callbacks").ModelCheckpoint
    # At the end of a pass over the six batches: in the middle of one, a Trainer asks for a loader that can resume.
    saving = checkpoint(tmp_path, filename="at", every_n_train_steps=6, save_top_k=-1)
    begun = trainer(tmp_path, enable_checkpointing=True, callbacks=[saving])
    begun.fit(repair_module(Repair(first, original, STEPS)), loader())
    saved = torch.load(tmp_path / "at.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == {f"model.{name}" for name in model.state_dict()}
    assert saved["global_step"] == 6
    trainer(tmp_path).fit(repair_module(Repair(second, original, STEPS)), loader(), ckpt_path=tmp_path / "at.ckpt")
    assert same(whole, second)
    assert not same(whole, model)


def test_a_trainer_that_ends_elsewhere_is_refused(tmp_path: Path) -> None:
    original, model = fitted()
    with pytest.raises(ValueError, match="max_steps=8, and the repair takes 5 steps"):
        trainer(tmp_path).fit(repair_module(Repair(model, original, 5)), loader())


def test_the_trainers_precision_is_used(tmp_path: Path) -> None:
    original, model = fitted()
    seen: list[torch.dtype] = []
    hook = model.head.register_forward_hook(lambda m, a, y: seen.append(y.dtype))  # type: ignore[union-attr]
    trainer(tmp_path, precision="bf16-mixed", max_steps=2).fit(repair_module(Repair(model, original, 2)), loader())
    hook.remove()
    assert set(seen) == {torch.bfloat16}
