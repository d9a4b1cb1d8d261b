"""A folded state goes into a fresh model through the manifest, which survives JSON."""

import json
from typing import Any

import pytest
import torch

from stabnorm import apply_manifest, fold_norms
from tests.families import EVERY_FAMILY, FAMILIES, Family
from tests.fold.nets import swapped
from tests.fold.test_families import error, ready

pytestmark = pytest.mark.filterwarnings("ignore:a bias was added to .* LoRA adapters")


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_a_fresh_model_takes_the_folded_weights(family: Family) -> None:
    result = fold_norms(ready(family, center=True), tuple(family.example()))
    manifest = json.loads(json.dumps(result.manifest))
    fresh = apply_manifest(swapped(family.build(seed=5)).eval(), manifest)
    fresh.load_state_dict(result.model.state_dict(), strict=True)
    assert [type(m).__name__ for m in fresh.modules()] == [type(m).__name__ for m in result.model.modules()]
    assert error(fresh, result.model, [family.example(1)]) == 0


def test_a_manifest_of_another_model_is_refused_before_anything_changes() -> None:
    family = FAMILIES["bert"]
    result = fold_norms(ready(family, center=True), tuple(family.example()))
    other = FAMILIES["llama"].build()
    before = list(other.modules())
    with pytest.raises(ValueError, match=r"no 'embeddings\.LayerNorm'"):
        apply_manifest(other, result.manifest)
    with pytest.raises(ValueError, match="format None"):
        apply_manifest(other, {})
    assert list(other.modules()) == before


def test_a_parameter_or_an_rms_norm_that_is_not_there_is_named_before_anything_changes() -> None:
    family = FAMILIES["gpt-2, tied head"]
    manifest = fold_norms(ready(family, center=True), tuple(family.example())).manifest
    for wrong in ({"untied": ["head.weight"]}, {"rms": {"no.norm": {"num_features": 4, "eps": 1e-5}}}):
        fresh = swapped(family.build()).eval()
        before = list(fresh.modules())
        with pytest.raises(ValueError, match=r"no 'head\.weight'|no 'no\.norm'"):
            apply_manifest(fresh, {**manifest, **wrong})
        assert list(fresh.modules()) == before


def test_a_hugging_face_config_is_told_that_the_head_is_untied() -> None:
    class Config:
        tie_word_embeddings = True

    family = FAMILIES["gpt-2, tied head"]
    model: Any = ready(family, center=True)
    model.config = Config()
    result = fold_norms(model, tuple(family.example()))
    assert model.config.tie_word_embeddings
    assert result.model.config.tie_word_embeddings is False  # type: ignore[union-attr]
    assert torch.equal(result.model.get_submodule("wte").weight, model.wte.weight)  # type: ignore[arg-type]
