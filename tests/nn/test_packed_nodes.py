"""Batch norm with a mask on padded graphs is BatchNorm over the packed nodes, as graph transformers use it."""

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabnorm import valid_tokens
from stabnorm.nn import PRepBN, RepBN
from stabnorm.ops import use_kernels

SIZES = [5, 1, 9, 3]  # nodes of the graphs in a batch
MASK = torch.arange(max(SIZES)) < torch.tensor(SIZES)[:, None]


def drawn(norm: Any) -> Any:
    for name, parameter in norm.named_parameters():
        if not name.endswith("eta"):
            nn.init.normal_(parameter, 1.0, 0.3)
    return norm


def batch(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Padded nodes with garbage in the padding, and upstream gradients that are 0 there."""
    generator = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(*MASK.shape, 6, generator=generator, dtype=dtype) for _ in range(2))
    return torch.where(MASK[..., None], 2 * x + 1, 1e4), torch.where(MASK[..., None], dy, 0)


@pytest.mark.parametrize("setting", ["reference", "aten", "cpp"])
@pytest.mark.parametrize("by_context", [False, True])
def test_masked_batch_norm_is_that_of_the_packed_nodes(by_context: bool, setting: str) -> None:
    dtype, tolerance = (torch.float64, 1e-10) if setting == "reference" else (torch.float32, 1e-5)
    near = functools.partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    packed = drawn(nn.BatchNorm1d(6).to(dtype))
    norm = RepBN(6, init="norm").to(dtype)
    norm.load_state_dict(packed.state_dict(), strict=False)
    for step in range(4):
        x, dy = batch(step, dtype)
        padded, nodes = x.clone().requires_grad_(), x[MASK].requires_grad_()
        with use_kernels(setting):
            if by_context:
                with valid_tokens(MASK):
                    y = norm(padded)
            else:
                y = norm(padded, MASK)
            y.backward(dy)
        want = packed(nodes)
        want.backward(dy[MASK])
        assert padded.grad is not None
        assert nodes.grad is not None
        near(y[MASK], want)
        near(padded.grad[MASK], nodes.grad)
        assert not padded.grad[~MASK].any()
    assert norm.bias is not None
    near(norm.weight.grad, packed.weight.grad)
    near(norm.bias.grad, packed.bias.grad)
    near(norm.running_mean, packed.running_mean)
    near(norm.running_var, packed.running_var)
    x, _ = batch(9, dtype)
    near(norm.eval()(x, MASK)[MASK], packed.eval()(x[MASK]))


def test_a_switched_norm_is_the_blend_of_both_on_the_packed_nodes() -> None:
    norm = drawn(PRepBN(6).double())
    layer, packed = drawn(nn.LayerNorm(6).double()), drawn(nn.BatchNorm1d(6).double())
    for one, of_norm in ((layer, norm), (packed, norm.rep)):
        one.weight.data.copy_(of_norm.weight)
        one.bias.data.copy_(of_norm.bias)
    norm.lam.fill_(0.3)
    x, _ = batch(0, torch.float64)
    with valid_tokens(MASK):
        y = norm(x)
    torch.testing.assert_close(y[MASK], 0.3 * layer(x[MASK]) + 0.7 * packed(x[MASK]))
    torch.testing.assert_close(norm.rep.running_var, packed.running_var)


def test_a_padded_graph_transformer_is_the_packed_one() -> None:
    """Packed, all nodes of a batch are one graph without edges between the parts."""
    pytest.importorskip("sklearn")  # of the example
    from stabnorm.examples.graphs import GraphTransformer

    torch.manual_seed(0)
    padded = GraphTransformer(width=8, heads=2, depth=2).double()
    packed = copy.deepcopy(padded)
    nodes = torch.randn(*MASK.shape, 17, dtype=torch.float64)
    near = torch.rand(len(SIZES), MASK.shape[1], MASK.shape[1]) < 0.4
    edges = (near & MASK[:, None] & MASK[..., None]) | torch.eye(MASK.shape[1], dtype=torch.bool)
    whole = torch.block_diag(*(graph[:size, :size].int() for graph, size in zip(edges, SIZES, strict=True))).bool()
    with valid_tokens(MASK):
        x = padded.embed(nodes)
        for layer in padded.layers:
            x = layer(x, edges)
    z = packed.embed(nodes[MASK][None])
    for layer in packed.layers:
        z = layer(z, whole[None])
    torch.testing.assert_close(x[MASK], z[0], rtol=1e-9, atol=1e-9)
    upstream = torch.randn_like(z[0])
    x[MASK].backward(upstream)
    z[0].backward(upstream)
    for (name, one), other in zip(padded.named_parameters(), packed.parameters(), strict=True):
        if other.grad is not None:  # the head was not called
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-8, atol=1e-8, msg=name)
    state = packed.state_dict()
    for name, buffer in padded.named_buffers():
        torch.testing.assert_close(buffer, state[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.slow
def test_the_example_leaves_no_norm(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    from stabnorm.examples import graphs

    model, result = graphs.main(["--steps", "3"])
    assert [norm.status for norm in result.norms] == ["residual"] * 3 + ["forward"]
    assert not any(isinstance(part, RepBN) for part in result.model.modules())
    example = graphs.digit_graphs().rows(torch.arange(64))
    assert graphs.accuracy(result.model, example) == pytest.approx(graphs.accuracy(model, example), abs=0.02)
    assert "4 norms: 1 forward, 3 residual" in capsys.readouterr().out
