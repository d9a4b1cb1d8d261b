"""Pre-LN to Pre-RMSNorm: the same function with a stream of mean zero, or the reason why not."""

import json
from typing import Any

import pytest
import torch
from torch import nn

from stabnorm import StabNormError, apply_manifest, find_norms, to_pre_rms
from stabnorm.fold import FoldResult
from tests.families import EVERY_FAMILY, FAMILIES, Family, randomize_
from tests.fold.nets import Net, draw, error_of, ready
from tests.fold.test_families import cast, error

pytestmark = pytest.mark.filterwarnings("ignore:a bias was added to .* LoRA adapters")
CONVERTED = {
    "vit, qk-norm": 5, "vit, mean pool and fc_norm": 5, "deit, distilled": 5, "swin": 5, "pvt": 1,
    "albert, one shared block": 1, "gpt-2, tied head": 5, "nanogpt, bias-free": 5, "nanogpt with lora": 5, "whisper": 4,
    "torch encoder, pre-norm": 5, "torch encoder, pre-norm, bias-free": 5, "torch transformer, pre-norm": 12,
}  # fmt: skip
SAYS = {
    "vit, class token": "without a norm",  # its layer scale multiplies each channel by its own
    "bert": "bias found no reader",
    "peri-ln with multi-head attention": "add reads it without a norm",
    "llama": "only a LayerNorm",
}


def converted(family: Family, **options: Any) -> tuple[nn.Module, FoldResult]:
    model = randomize_(family.build(), seed=1).double().eval()
    return model, to_pre_rms(model, tuple(cast(family.example(), torch.float64)), **options)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_pre_norm_families_turn_into_rms_exactly(family: Family) -> None:
    """T16: the same function, to 1e-12 in float64."""
    model, result = converted(family)
    assert sum(norm.status == "rms" for norm in result.norms) == CONVERTED.get(family.name, 0), str(result)
    limit = 1e-5 if family.name == "gemma 2" else 1e-12  # its norm goes through float32 whatever the model
    assert error(result.model, model, [cast(family.example(seed), torch.float64) for seed in (0, 1)]) < limit
    kinds = {layer.name: layer.kind for layer in find_norms(result.model)}
    for norm in result.norms:
        assert norm.status in ("rms", "kept")
        if norm.status == "rms":
            assert kinds[norm.name] == "rms"
            assert norm.into
        else:
            assert norm.reason
    if family.name in SAYS:
        assert SAYS[family.name] in str(result)


def test_every_norm_then_reads_a_mean_of_zero() -> None:
    family = FAMILIES["deit, distilled"]
    _, result = converted(family)
    means = []
    for norm in result.norms:
        module = result.model.get_submodule(norm.name)
        module.register_forward_pre_hook(lambda m, args: means.append(args[0].mean(-1).abs().max() / args[0].std()))
    result.model(*cast(family.example(1), torch.float64).args)
    assert len(means) == family.norms
    assert max(means) < 1e-14


def test_a_tied_head_keeps_its_embedding_as_it_was() -> None:
    family = FAMILIES["gpt-2, tied head"]
    _, result = converted(family)
    assert "wte.weight" in result.manifest["untied"] or "lm_head.weight" in result.manifest["untied"]
    assert not any(norm.status == "rms" for norm in converted(family, tied="refuse")[1].norms)


def test_the_weights_load_through_the_manifest() -> None:
    family = FAMILIES["torch encoder, pre-norm"]
    _, result = converted(family)
    fresh = apply_manifest(family.build(seed=5).double().eval(), json.loads(json.dumps(result.manifest)))
    fresh.load_state_dict(result.model.state_dict(), strict=True)
    assert error(fresh, result.model, [family.example(1)]) == 0


def stream(read: Any) -> nn.Module:
    parts = {"fc": nn.Linear(6, 6), "norm": nn.LayerNorm(6), "up": nn.Linear(6, 6), "last": nn.LayerNorm(6)}
    return ready(Net(read, head=nn.Linear(6, 5), **parts))


@pytest.mark.parametrize(
    "read",
    [
        lambda m, x: (lambda h: (m.head(m.last(h + m.up(m.norm(h)))), h))(m.fc(x)),
        lambda m, x: (lambda h: m.head(m.last(h + m.up(m.norm(h)))) + h.relu()[..., :5])(m.fc(x)),
        lambda m, x: (lambda h: m.head(m.last(h + m.up(m.norm(h)))) + m.head(h))(m.fc(x)),
        lambda m, x: (lambda h: m.head(m.last(h.flip(-1) + m.up(m.norm(h)))))(m.fc(x)),
        lambda m, x: (lambda h: m.head(m.last(h + m.up(m.norm(h)))))(m.fc(x) + x),
    ],
    ids=["returned", "read raw", "read by a linear", "channels in another order", "a raw input joins"],
)
def test_a_stream_that_is_seen_otherwise_is_left(read: Any) -> None:
    model = stream(read)
    result = to_pre_rms(model, draw(3, 6))
    assert {norm.status for norm in result.norms} == {"kept"}
    assert "rolled back" not in str(result)
    assert error_of(result.model, model, [(draw(2, 6, seed=1),)]) < 1e-12


def test_training_mode_is_refused() -> None:
    with pytest.raises(StabNormError, match=r"eval\(\)"):
        to_pre_rms(FAMILIES["deit, distilled"].build(), tuple(FAMILIES["deit, distilled"].example()))


def pre_norm(read: Any) -> nn.Module:
    """An embedding, a norm and what reads it; randomised."""
    model = Net(lambda m, ids: m.fc(read(m, m.embedding(ids))), embedding=nn.Embedding(7, 6), norm=nn.LayerNorm(6),
                fc=nn.Linear(6, 5))  # fmt: skip
    return ready(model)


@pytest.mark.parametrize(
    ("read", "says"),
    [
        (lambda m, x: m.norm(input=x), "unexpected keyword argument 'input'"),
        (lambda m, x: m.norm(x) * m.norm.bias.numel(), "no attribute 'bias'"),
    ],
)
def test_what_does_not_run_with_an_rms_norm_is_taken_back(read: Any, says: str) -> None:
    model, ids = pre_norm(read), torch.arange(6)
    result = to_pre_rms(model, ids)
    assert [norm.status for norm in result.norms] == ["kept"]
    assert "rolled back" in result.norms[0].reason
    assert says in result.norms[0].reason
    assert error_of(result.model, model, [(ids.flip(0),)]) < 1e-12


def test_a_norm_with_hooks_stays_since_they_would_go_with_it() -> None:
    model = pre_norm(lambda m, x: m.norm(x))
    model.get_submodule("norm").register_forward_hook(lambda *_: None)
    result = to_pre_rms(model, torch.arange(6))
    assert [norm.status for norm in result.norms] == ["kept"]
    assert "hooks" in result.norms[0].reason
