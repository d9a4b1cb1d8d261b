"""Masks reach the tokens that they are about, and no others: given directly, from several threads, and inverted."""

import _thread
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stabnorm import StabilityMonitor, convert_norms, valid_tokens
from stabnorm._models import masks
from stabnorm.companions import AttentionCompanion
from stabnorm.nn import PowerNorm, RepBN, UnifiedNorm

NORMS: dict[str, Callable[[], nn.Module]] = {
    "rep": lambda: RepBN(8),
    "unified": lambda: UnifiedNorm(8),
    "power": lambda: PowerNorm(8),
    "prep": lambda: _converted(),
}


def _converted() -> nn.Module:
    model = nn.Sequential(nn.LayerNorm(8))
    convert_norms(model)
    return model[0]


@pytest.mark.slow
@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("keyword", [False, True])
def test_a_mask_given_to_a_norm_is_the_monitors_mask(
    make: Callable[[], nn.Module], keyword: bool, compiled: bool
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = make()

        def forward(self, x: Any, mask: Any) -> Any:
            return self.norm(x, mask=mask) if keyword else self.norm(x, mask)

    torch._dynamo.reset()
    model = Model()
    run: Any = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    x, mask = torch.randn(2, 5, 8), torch.arange(5) < torch.tensor([[2], [4]])
    x[~mask] = 1e6
    with StabilityMonitor(model, "full") as monitor:
        run(x, mask)
        monitor.step()
    history = monitor.history()
    assert history["tokens"].item() == 6
    assert history["amax"].item() < 10


@pytest.mark.parametrize("keeps", [(2, 5), (2, None)])
def test_each_of_two_threads_has_its_own_masks(keeps: tuple[int | None, ...]) -> None:
    models = [nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)) for _ in keeps]
    monitors, both_are_open = [StabilityMonitor(model) for model in models], threading.Barrier(2, timeout=120)

    def train(model: nn.Module, keep: int | None) -> None:
        with nullcontext() if keep is None else valid_tokens(torch.arange(6) < keep):
            both_are_open.wait()
            model(torch.randn(6, 4)).sum().backward()
            both_are_open.wait()

    with monitors[0], monitors[1]:
        threads = [threading.Thread(target=train, args=pair) for pair in zip(models, keeps, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for monitor in monitors:
            monitor.step()
    assert [monitor.history()["tokens"].item() for monitor in monitors] == [keep or 6 for keep in keeps]


def test_each_of_two_threads_has_its_own_attention() -> None:
    models = [nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True) for _ in range(2)]
    monitors = [StabilityMonitor(model, companions=[AttentionCompanion(queries=None)]) for model in models]
    at_once = threading.Barrier(2, timeout=120)

    def wait(*_: object) -> None:
        at_once.wait()

    def train(model: Any, tokens: int) -> None:
        model.self_attn.register_forward_pre_hook(wait)
        model.self_attn.register_forward_hook(wait)
        model(torch.randn(3, tokens, 8))

    with monitors[0], monitors[1]:
        threads = [threading.Thread(target=train, args=(model, n)) for model, n in zip(models, (4, 7), strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        queries = [monitor.companions["attention"].watch.take().queries.tolist() for monitor in monitors]
    assert queries == [[12, 12], [21, 21]]


def test_the_recompute_of_a_checkpoint_in_an_autograd_thread_sees_the_masks_of_all_threads() -> None:
    seen: list[int] = []

    def foreign() -> None:
        seen.append(len(masks._Open().contexts))

    with valid_tokens(torch.ones(6, dtype=torch.bool)):
        thread = _thread.start_new_thread(foreign, ())
        assert thread
        while not seen:
            time.sleep(0.001)
    assert seen == [1]


@pytest.mark.parametrize(("batches", "asks"), [([6, 1], 1), ([6, 6, 2], 1), ([6, 4, 1], 0), ([6] * 20, 0), ([0], 1)])
def test_a_mask_that_may_be_inverted_is_asked_about_once(
    batches: list[int], asks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masks, "_unasked", 10)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for keep in [*batches, *batches]:
            with valid_tokens(torch.arange(6) < keep):
                pass
    found = [str(warning.message) for warning in caught if "pass ~mask" in str(warning.message)]
    assert len(found) == asks
    if asks:
        assert str(Path(__file__).name) in str(caught[0].filename)


def test_a_share_that_was_only_noted_is_asked_about_at_the_next_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "_unasked", 10)
    monkeypatch.setattr(masks, "_noted", [((2, 6), torch.tensor(1.0)), ((2, 6), torch.tensor(0.25))])  # as on a GPU
    model = nn.Sequential(nn.LayerNorm(8))
    with StabilityMonitor(model, gradients=False) as monitor:
        model(torch.randn(2, 8))
        monitor.step()
        with pytest.warns(UserWarning, match=r"of shape \(2, 6\), leaves out 75 % of the tokens.*pass ~mask"):
            monitor.flush()
    assert masks._noted == []
    assert masks._unasked == 0


def test_a_sparse_mask_is_refused_in_words() -> None:
    with pytest.raises(TypeError, match=r"dense tensor, got one of torch\.sparse_coo\. Use mask\.to_dense\(\)"):
        valid_tokens(torch.ones(2, 3, dtype=torch.bool).to_sparse())
