"""Folded models go through torch.export, torch.compile and ONNX, and no normalization is left in their graphs."""

import copy
from collections import Counter
from typing import Any

import onnxruntime
import pytest
import torch
from torch import nn

from stabnorm import fold_norms
from stabnorm.fold import FrozenAffine
from stabnorm.nn import RepBN
from tests.families import FAMILIES, Family
from tests.fold.nets import relative_error
from tests.fold.test_families import ready
from tests.versions import TORCH

NAMES = ("deit, distilled", "gpt-2, tied head", "llama", "torch encoder, pre-norm", "convnext", "swin", "bert")
TORCH_NORMS = ("layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm", "rsqrt", "var_mean", "sqrt")


def pair(family: Family) -> tuple[nn.Module, nn.Module, tuple[Any, ...], dict[str, Any]]:
    model = ready(family, center=True)
    args, kwargs = family.example()
    return model, fold_norms(model, (args, kwargs)).model, args, kwargs


@pytest.mark.slow
@pytest.mark.parametrize("family", [FAMILIES[name] for name in NAMES], ids=str)
def test_the_exported_graph_has_no_norm(family: Family) -> None:
    _, folded, args, kwargs = pair(family)
    program = torch.export.export(folded, args, kwargs)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [target for target in targets if any(norm in target for norm in TORCH_NORMS)]
    with torch.no_grad():
        assert relative_error(program.module()(*args, **kwargs), folded(*args, **kwargs)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("family", [FAMILIES[name] for name in NAMES], ids=str)
def test_it_compiles_to_one_graph(family: Family) -> None:
    _, folded, args, kwargs = pair(family)
    compiled = torch.compile(copy.deepcopy(folded), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert relative_error(compiled(*args, **kwargs), folded(*args, **kwargs)) < 1e-5


def exported(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str) -> Counter[str]:
    """The operators of a model's ONNX graph, functions written out."""
    program = torch.onnx.export(model, args, kwargs=kwargs, dynamo=True, verbose=False)
    assert program is not None
    program.save(path)
    graph = program.model_proto
    nodes = [*graph.graph.node, *(node for function in graph.functions for node in function.node)]
    return Counter(node.op_type for node in nodes)


def without_norms(model: nn.Module) -> nn.Module:
    """The floor: the same network with its norms deleted."""
    bare = copy.deepcopy(model)
    for module in list(bare.modules()):
        for name, child in module._modules.items():
            if isinstance(child, RepBN):
                module._modules[name] = nn.Identity()
    return bare


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize("name", ["deit, distilled", "llama", "bert", "mixer"])
def test_onnx_has_the_operators_of_a_network_without_norms_and_its_runtime_agrees(name: str, tmp_path: Any) -> None:
    model, folded, args, kwargs = pair(FAMILIES[name])
    operators, errors = {}, {}
    for kind, each in (("unfolded", model), ("folded", folded), ("bare", without_norms(model))):
        path = str(tmp_path / f"{kind}.onnx")
        operators[kind] = exported(each, args, kwargs, path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        feed = {i.name: value.numpy() for i, value in zip(session.get_inputs(), [*args, *kwargs.values()], strict=True)}
        (output,) = session.run(None, feed)
        with torch.no_grad():
            errors[kind] = relative_error(torch.from_numpy(output), each(*args, **kwargs))
    assert not [op for op in operators["folded"] if "Norm" in op]
    left = sum(isinstance(module, FrozenAffine) for module in folded.modules())
    more = operators["folded"] - operators["bare"]
    old = TORCH < (2, 7)  # its exporter writes a multiply-add with a factor of 1 and the casts of that
    casts = {"Cast", "CastLike", "Constant"} if old else set()
    assert set(more) <= {"Add", "Mul"} | casts  # biases there were not, and what is left as multiply-adds
    assert more["Mul"] == left * (2 if old else 1)
    assert operators["unfolded"] - operators["bare"]
    assert errors["folded"] < 4 * max(errors["unfolded"], 1e-7)
