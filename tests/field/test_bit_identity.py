"""Weights, losses, random state and every module's output in eval are bit-identical with and without the callback."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import StochasticWeightAveraging
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, Subset, TensorDataset

from stabnorm import StabilityMonitor
from stabnorm.callbacks import StabilityCallback

WIDTH, LENGTH, SIZE, BATCHES = 16, 6, 4, 6
COMPANIONS = ["attention", "output", "weights"]


def data(batches: int = BATCHES) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SIZE * batches, LENGTH, WIDTH, generator=generator)
    return TensorDataset(x, torch.randn(SIZE * batches, LENGTH, 1, generator=generator))


def encoder(norm: Callable[[int], nn.Module] = nn.LayerNorm) -> nn.Sequential:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, 0.1, batch_first=True)
    plain = nn.LayerNorm(WIDTH, elementwise_affine=False)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), layer, plain, norm(WIDTH), nn.Dropout(0.1), nn.Linear(WIDTH, 1))


class Base(pl.LightningModule):
    """Keeps its losses; a regression with an encoder."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.losses: list[Tensor] = []
        self.build()

    def build(self) -> None:
        self.net = encoder()

    def training_step(self, batch: Any, index: int) -> Any:
        loss = (self.net(batch[0]) - batch[1]).square().mean()
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.losses.append((self.net(batch[0]) - batch[1]).square().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-3)


class TeacherAndStudent(Base):
    """The teacher is frozen, in eval mode, and runs on its fused path with a padding mask."""

    def build(self) -> None:
        self.net, self.teacher = encoder(), encoder().eval().requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        self.teacher.eval()

    def training_step(self, batch: Any, index: int) -> Any:
        padding = torch.arange(LENGTH) >= 1 + torch.arange(SIZE)[:, None]
        with torch.no_grad():
            hidden = self.teacher[1](self.teacher[0](batch[0]), src_key_padding_mask=padding)
            wanted = self.teacher[2:](hidden)
        loss = (self.net(batch[0]) - wanted).square().mean()
        self.losses.append(loss.detach())
        return loss


class Gan(Base):
    """Two optimizers by hand, a critic that is frozen for the generator's step, and a gradient penalty."""

    def build(self) -> None:
        self.automatic_optimization = False
        self.net, self.critic = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)), encoder()
        self.critic[1] = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU())

    def training_step(self, batch: Any, index: int) -> None:
        both: Any = self.optimizers()
        of_generator, of_critic = both
        self.critic.requires_grad_(True)
        fake = self.net(torch.randn_like(batch[0]))
        between = batch[0].lerp(fake.detach(), torch.rand(SIZE, 1, 1)).requires_grad_()
        (slope,) = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)
        loss = (
            self.critic(fake.detach()).mean() - self.critic(batch[0]).mean() + (slope.norm(2, -1) - 1).square().mean()
        )
        of_critic.zero_grad()
        self.manual_backward(loss)
        of_critic.step()
        self.critic.requires_grad_(False)
        of_generator.zero_grad()
        self.manual_backward(-self.critic(fake).mean())
        of_generator.step()
        self.losses.append(loss.detach())

    def validation_step(self, batch: Any, index: int) -> None:
        self.losses.append(self.critic(batch[0]).mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.net.parameters(), 1e-3), torch.optim.Adam(self.critic.parameters(), 1e-3)


class Averaged(Base):
    """An exponential moving average of the weights, as a copy that was made while the model was watched."""

    def on_train_start(self) -> None:
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        self.averaged = [torch.optim.swa_utils.AveragedModel(self.net, multi_avg_fn=average)]

    def on_train_batch_end(self, *_: Any) -> None:
        self.averaged[0].update_parameters(self.net)

    def validation_step(self, batch: Any, index: int) -> None:
        super().validation_step(batch, index)
        if hasattr(self, "averaged"):
            self.losses.append(self.averaged[0].eval()(batch[0]).mean())


class Pruned(Base):
    """A norm and a linear layer are pruned; pruning puts pre-hooks on them."""

    def build(self) -> None:
        super().build()
        prune.l1_unstructured(self.net[3], "weight", 0.25)  # type: ignore[no-untyped-call]
        prune.l1_unstructured(self.net[0], "weight", 0.5)  # type: ignore[no-untyped-call]


class TwoOptimizers(Base):
    """Two optimizers under autocast, each with a scaler of its own where the CPU has one."""

    def build(self) -> None:
        super().build()
        self.automatic_optimization = False
        self.scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**power) for power in (8, 12)]

    def training_step(self, batch: Any, index: int) -> None:
        both: Any = self.optimizers()
        for optimizer, scaler in zip(both, self.scalers, strict=True):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = (self.net(batch[0]) - batch[1]).square().mean()
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            scaler.step(optimizer)
            scaler.update()
            self.losses.append(loss.detach())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net[:2].parameters(), 1e-2), torch.optim.Adam(self.net[2:].parameters(), 1e-3)


class Functional(Base):
    """Gradients of each sample by torch.func, beside the ordinary loss."""

    def build(self) -> None:
        parts = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH, elementwise_affine=False), nn.RMSNorm(WIDTH)
        self.net = nn.Sequential(nn.Linear(WIDTH, WIDTH), *parts, nn.Linear(WIDTH, 1))

    def training_step(self, batch: Any, index: int) -> Any:
        parameters = {name: p.detach() for name, p in self.net.named_parameters()}

        def of_sample(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            out: Tensor = torch.func.functional_call(self.net, parameters, (x,))
            return (out - y).square().mean()

        each = torch.func.vmap(torch.func.grad(of_sample), (None, 0, 0))(parameters, *batch)
        self.losses += [gradient.square().mean() for gradient in each.values()]
        return super().training_step(batch, index)


class Compiled(Base):
    def build(self) -> None:
        super().build()
        torch._dynamo.reset()
        self.net.compile(backend="aot_eager")


class Experts(Base):
    """A mixture in which some experts see no token in a step."""

    def build(self) -> None:
        self.gate = nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList(encoder(nn.RMSNorm) for _ in range(4))

    def net(self, x: Tensor) -> Tensor:  # type: ignore[override]
        chosen = self.gate(x).mean((0, 1)).topk(2)
        pairs = zip(chosen.values, chosen.indices, strict=True)
        return torch.stack([share * self.experts[int(index)](x) for share, index in pairs]).sum(0)


CASES: dict[str, type[Base]] = {
    "teacher and student": TeacherAndStudent,
    "gan with a gradient penalty": Gan,
    "moving average": Averaged,
    "stochastic weight averaging": Base,
    "pruning": Pruned,
    "two optimizers with autocast": TwoOptimizers,
    "torch.func": Functional,
    "compiled": Compiled,
    "experts": Experts,
}


@contextmanager
def outputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Keep the output of every module's forward."""
    outputs: list[Tensor] = []
    handles = [
        part.register_forward_hook(
            lambda m, a, y: outputs.append(y.detach().clone()) if isinstance(y, Tensor) else None
        )
        for part in module.modules()
    ]
    yield outputs
    for handle in handles:
        handle.remove()


def trained(
    make: type[Base], folder: Path, callbacks: list[Any], dataset: Any, **options: Any
) -> dict[str, list[Tensor]]:
    module = make()
    torch.manual_seed(1)
    trainer = pl.Trainer(
        default_root_dir=folder, accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, callbacks=callbacks, **options,
    )  # fmt: skip
    loader = DataLoader(dataset, batch_size=SIZE, shuffle=True)
    trainer.fit(module, loader, DataLoader(data(2), batch_size=SIZE))
    after = torch.get_rng_state()
    module.eval()
    x = data(1).tensors[0]
    run: Any = module.critic if isinstance(module, Gan) else module.net
    with torch.no_grad():
        fused = run(x)  # without hooks, so that torch's fused paths run
        torch._dynamo.reset()  # graphs do not look whether there are hooks
        with outputs_of(module) as outputs:
            run(x)
    return {
        "losses": module.losses, "random state": [after], "weights": [*module.state_dict().values()],
        "outputs": [fused, *outputs], "gradients": [p.grad for p in module.parameters() if p.grad is not None],
    }  # fmt: skip


def assert_same_bits(found: dict[str, list[Tensor]], expected: dict[str, list[Tensor]]) -> None:
    for name, values in expected.items():
        assert len(found[name]) == len(values), name
        assert values or name == "gradients"
        for number, (one, other) in enumerate(zip(found[name], values, strict=True)):
            assert torch.equal(one, other), f"{name}, number {number} of {len(values)}"


def others(case: str) -> list[Any]:
    return [StochasticWeightAveraging(1e-3, 1, 1)] if case == "stochastic weight averaging" else []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("preset", ["standard", "full"])
@pytest.mark.parametrize("case", CASES)
def test_a_watched_training_has_the_bits_of_an_unwatched_one(case: str, preset: str, tmp_path: Path) -> None:
    options = {"accumulate_grad_batches": 2} if case in ("experts", "pruning", "teacher and student") else {}
    expected = trained(CASES[case], tmp_path, others(case), data(), **options)
    companions = [
        name for name in COMPANIONS if name != "attention" or case not in ("gan with a gradient penalty", "torch.func")
    ]
    watch = StabilityCallback(preset, flush_every=4, companions=companions)
    found = trained(CASES[case], tmp_path, [*others(case), watch], data(), **options)
    assert watch.monitor is not None
    assert watch.monitor.history()["tokens"].sum() > 0
    assert_same_bits(found, expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_folds_of_a_cross_validation_have_the_bits_of_unwatched_ones(tmp_path: Path) -> None:
    whole, watch = data(), StabilityCallback(flush_every=4)
    for fold in range(3):
        part = Subset(whole, [i for i in range(len(whole)) if i % 3 != fold])
        expected = trained(Base, tmp_path, [], part)
        assert_same_bits(trained(Base, tmp_path, [watch], part), expected)


@pytest.mark.filterwarnings("ignore")
def test_a_plain_loop_has_the_bits_of_an_unwatched_one_in_training_and_in_eval() -> None:
    results = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = encoder()
        monitor, x = StabilityMonitor(model, "full", companions=["attention", "output"]), data(1).tensors[0]
        optimizer, values = torch.optim.Adam(model.parameters(), 1e-3), []
        if watched:
            monitor.attach()
        for _ in range(4):
            optimizer.zero_grad()
            loss = model.train()(x).square().mean()
            loss.backward()
            optimizer.step()
            if watched:
                monitor.step(loss=loss)
            with torch.no_grad():
                values += [loss.detach(), model.eval()(x), copy.deepcopy(model)(x)]
        monitor.detach()
        results.append([*values, torch.get_rng_state(), *model.state_dict().values()])
    assert all(map(torch.equal, *results))
