"""Companions in a compiled model: one graph, and the figures of the eager one."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from stabnorm import StabilityMonitor
from tests.companions.nets import Fused, MultiHead, Text, batch, loss

pytestmark = pytest.mark.slow

ALL = ("attention", "weights", "embedding", "output")


def train(compiled: Any, recompute: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(5)
    torch.compiler.reset()
    # A key bias has no gradient but rounding noise, which AdamW would blow up: SGD.
    model = Text(Fused(), MultiHead(False), Fused(written_out=True), MultiHead(True))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.01)
    monitor = StabilityMonitor(model, companions=ALL)
    monitor.attach()
    run = model if compiled is None else torch.compile(model, backend=compiled, fullgraph=True)
    call = (lambda tokens: checkpoint(run, tokens, use_reentrant=False)) if recompute else run
    for _ in range(6):
        optimizer.zero_grad()
        loss(call, batch()).backward()
        loss(run, batch()).backward()  # without it what counted twice would have the same mean
        optimizer.step()
        monitor.step()
    monitor.detach()
    return {name: v for track in monitor.companions.values() for name, v in track.history().items()}


@pytest.mark.parametrize("recompute", [False, True])
def test_a_compiled_model_is_one_graph_with_the_same_figures(recompute: bool) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    eager, compiled = train(None), train(counter, recompute)
    assert counter.frame_count == 1
    for name, values in eager.items():
        torch.testing.assert_close(compiled[name], values, rtol=1e-5, atol=1e-6, msg=name)


def test_watching_a_compiled_model_changes_no_bit() -> None:
    def trained(companions: tuple[str, ...]) -> list[Tensor]:
        torch.manual_seed(5)
        torch.compiler.reset()
        model = Text(Fused(), MultiHead(False))
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        with StabilityMonitor(model, "economy", companions=companions) as monitor:
            run = torch.compile(model, backend="aot_eager")
            for _ in range(3):
                optimizer.zero_grad()
                loss(run, batch()).backward()
                optimizer.step()
                monitor.step()
        return [parameter.detach() for parameter in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(trained(()), trained(ALL), strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own look at it
@pytest.mark.parametrize("alone", [False, True])
def test_an_output_layer_compiled_and_run_before_is_seen(alone: bool) -> None:
    torch.compiler.reset()
    model = Text()
    run = model if alone else torch.compile(model, backend="eager")
    if alone:  # in a graph without a norm
        model.head.compile(backend="eager")
    run(batch())
    with StabilityMonitor(model, companions=["output"]) as monitor:
        run(batch())
        monitor.step()
    assert monitor.companions["output"].history()["output_logit_max"].isfinite().all()
    assert type(model.head) is torch.nn.Linear


def test_attaching_to_a_compiled_attention_has_it_traced_anew() -> None:
    torch.compiler.reset()
    model = Text()
    run = torch.compile(model, backend="eager")
    run(batch())  # its graph calls torch's own function, and is not valid for another
    with StabilityMonitor(model, companions=["attention"]) as monitor:
        run(batch())
        monitor.step()
    assert not monitor.companions["attention"].history()["attention_entropy"].isnan().any()


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # torch's own, when Dynamo looks at SGD
def test_a_compiled_optimizer_step_is_not_seen_runs_as_ever_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    torch.compiler.reset()
    model = Text()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    with StabilityMonitor(model, companions=["weights", "embedding"]) as monitor:
        before = model.head.weight.detach().clone()
        loss(model, batch()).backward()
        step()
        monitor.step()
    assert model.head.weight.grad is not None
    torch.testing.assert_close(model.head.weight.detach(), before - 0.1 * model.head.weight.grad)
    assert monitor.companions["weights"].history()["update_ratio"].isnan().all()
    messages = [record.getMessage() for record in caplog.records if record.name == "stabnorm"]
    assert sum("no optimizer step was seen on tokens.weight" in text for text in messages) == 2
