"""What holds for every remedy that changes a model, as functions that its test calls with the model it is for."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabnorm import fold_norms
from stabnorm.remedies import RemedyReport, undo

Apply = Callable[[Any], RemedyReport]


class Block(nn.Module):
    """A pre-norm block whose heads, projections and norms are modules of their own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.out_proj = nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (
            p(h).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out_proj(attended)
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))  # type: ignore[no-any-return]


class Net(nn.Module):
    """A small pre-norm transformer over tokens."""

    def __init__(self, depth: int = 2, width: int = 8, heads: int = 2, vocabulary: int = 11) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def net(**sizes: int) -> Any:
    torch.manual_seed(0)
    model = Net(**sizes)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.5, 0.3)
    return model


def tokens(batch: int = 3, length: int = 5, vocabulary: int = 11) -> Tensor:
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


def largest(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def check_outputs(build: Callable[[], Any], x: Any, apply: Apply) -> None:
    """The report says the truth about the outputs, in training and in eval mode."""
    for training in (True, False):
        model = build().train(training)
        before = model(x)
        report = apply(model)
        after = model(x)
        if report.preserves == "bits":
            assert torch.equal(after, before)
        elif report.preserves == "1e-6":
            assert largest(after, before) < 5e-6
        else:
            assert largest(after, before) > 1e-4


def check_undo(build: Callable[[], Any], apply: Apply) -> None:
    """`undo` brings back names, classes and bits."""
    model = build()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    undo(apply(model))
    assert [type(module) for module in model.modules()] == classes
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def check_loading(build: Callable[[], Any], x: Any, apply: Apply) -> None:
    """A checkpoint from before loads strictly, as does one from after; both give the model that was saved."""
    old = build()
    with torch.no_grad():
        for parameter in old.parameters():
            parameter.mul_(1.3)
    model = build().eval()
    apply(model)
    model.load_state_dict(old.state_dict(), strict=True)
    apply(old)
    assert largest(model(x), old.eval()(x)) < 5e-6
    train(old, x)
    saved = io.BytesIO()
    torch.save(old.state_dict(), saved)
    saved.seek(0)
    model.load_state_dict(torch.load(saved, weights_only=True), strict=True)
    assert torch.equal(model(x), old.eval()(x))


def check_copies(build: Callable[[], Any], x: Any, apply: Apply) -> None:
    """Copies and pickles compute the same, and the model has a `repr`."""
    model = build().eval()
    apply(model)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    assert repr(model)


def check_fold(build: Callable[[], Any], x: Any, apply: Apply, randomize: bool = True) -> None:
    """`fold_norms` leaves a plain model that computes the same, to 1e-12 in float64; the manifest rebuilds it."""
    model = build().double()
    apply(model)
    if randomize:
        train(model, x)
    model.eval()
    expected = model(x)
    result = fold_norms(model, x, outputs=None)
    assert largest(result.model(x), expected) < 1e-12
    assert torch.equal(model(x), expected)


def train(model: Any, x: Any, steps: int = 3, lr: float = 0.05, seed: int = 3) -> list[float]:
    """Train to give random targets, and return the losses."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        y = model(x)
        loss = (y - torch.randn(y.shape, generator=generator).to(y)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def check_checkpointed(build: Callable[[], Any], x: Any, apply: Apply) -> None:
    """Activation checkpointing gives the same gradients, and changes the state as often as one forward does."""
    models = [build(), build()]
    for model in models:
        apply(model)
    models[0](x).square().mean().backward()
    run: Any = torch.utils.checkpoint.checkpoint
    run(models[1], x, use_reentrant=False).square().mean().backward()
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None and other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-7)
    for (name, one), other in zip(models[0].named_buffers(), models[1].buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7, msg=name)


def check_compiled(build: Callable[[], Any], x: Any, apply: Apply, training: bool = True) -> None:
    """One graph without a break computes the same."""
    torch.compiler.reset()
    plain, model = build().train(training), build().train(training)
    apply(plain)
    apply(model)
    expected = plain(x)
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    assert largest(y, expected) < 1e-5
    y.square().mean().backward()
    expected.square().mean().backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def check_autocast(build: Callable[[], Any], x: Any, apply: Apply) -> None:
    """Under autocast the model trains, and its parameters and buffers keep their precision."""
    model = build()
    apply(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    y.float().square().mean().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)
    assert all(t.dtype == torch.float32 for t in model.state_dict().values() if t.is_floating_point())


FAMILY: dict[str, Callable[..., None]] = {
    "outputs are as the report says": check_outputs,
    "undo brings everything back": lambda build, x, apply: check_undo(build, apply),
    "checkpoints load strictly": check_loading,
    "copies and pickles are the same": check_copies,
    "checkpointed blocks give the same gradients": check_checkpointed,
    "autocast trains it": check_autocast,
}
in_the_family = pytest.mark.parametrize("check", FAMILY.values(), ids=FAMILY.keys())
