"""Ties: exactly the parameter that must go is untied; saving and loading keep every other tie."""

import copy
import tempfile
from typing import Any

import pytest
import torch
from torch import nn

from stabnorm import apply_manifest, convert_norms, fold_norms
from stabnorm.fold import FoldResult
from stabnorm.nn import PRepBN, RepBN
from tests.fold.nets import Net, ready

pytestmark = pytest.mark.filterwarnings("default")  # the packages' own warnings are theirs
C, V = 6, 9


# --- what a model declares ---


class Declares(Net):
    """As transformers 5 does: each tie by name, and one flag for all, which the forward reads, too."""

    def __init__(self, ties: dict[str, str]) -> None:
        def forward(m: Any, ids: torch.Tensor) -> Any:
            x = m.encoder(ids) + m.decoder(ids)
            return m.head(m.norm(x) * (C**-0.5 if m.config.tie_word_embeddings else 1.0))

        super().__init__(
            forward, shared=nn.Embedding(V, C), encoder=nn.Embedding(V, C), decoder=nn.Embedding(V, C),
            norm=RepBN(C), head=nn.Linear(C, V, bias=False),
        )  # fmt: skip
        self.config = type("Config", (), {"tie_word_embeddings": True})()
        self._tied_weights_keys = self.all_tied_weights_keys = ties
        for target, source in ties.items():
            owner, _, attribute = target.rpartition(".")
            setattr(self.get_submodule(owner), attribute, self.get_parameter(source))


TIES = {
    "encoder.weight": "shared.weight",
    "decoder.weight": "shared.weight",
    "head.weight": "shared.weight",
}


def test_only_the_head_is_untied_and_the_flag_stays() -> None:
    model: Any = ready(Declares(dict(TIES)))
    result = fold_norms(model, torch.arange(8).view(2, 4))
    folded: Any = result.model
    assert [norm.status for norm in result.norms] == ["forward"]
    assert result.max_rel_error < 1e-12
    assert result.manifest["untied"] == ["head.weight"]
    assert folded.config.tie_word_embeddings
    left = {name: source for name, source in TIES.items() if name != "head.weight"}
    assert folded.all_tied_weights_keys == folded._tied_weights_keys == left
    assert folded.encoder.weight is folded.decoder.weight is folded.shared.weight
    assert folded.head.weight is not folded.shared.weight
    assert model.all_tied_weights_keys == TIES


def test_what_was_tied_to_an_untied_parameter_stays_tied_among_itself() -> None:
    ties = {"encoder.weight": "head.weight", "decoder.weight": "head.weight", "shared.weight": "head.weight"}
    folded: Any = fold_norms(ready(Declares(dict(ties))), torch.arange(8).view(2, 4)).model
    assert folded.all_tied_weights_keys == {"decoder.weight": "encoder.weight", "shared.weight": "encoder.weight"}


# --- the real classes ---

SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4, "pad_token_id": 0,
    "decoder_start_token_id": 0,
}  # fmt: skip
REAL: dict[str, tuple[str, dict[str, Any]]] = {
    "BartForConditionalGeneration": ("BartConfig", SEQ2SEQ),
    "MBartForConditionalGeneration": ("MBartConfig", SEQ2SEQ),
    "MarianMTModel": ("MarianConfig", SEQ2SEQ),
    "PegasusForConditionalGeneration": ("PegasusConfig", SEQ2SEQ),
    "M2M100ForConditionalGeneration": ("M2M100Config", SEQ2SEQ),
    "T5ForConditionalGeneration": ("T5Config", T5),
    "SwitchTransformersForConditionalGeneration": (
        "SwitchTransformersConfig",
        {
            **T5,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "num_decoder_layers": 1,
            "num_experts": 2,
        },
    ),
    "GPT2LMHeadModel": ("GPT2Config", {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4}),
}


def switched(model: nn.Module) -> nn.Module:
    convert_norms(model)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, PRepBN):
            module.lam.zero_()
            if module.rep.running_mean is not None:
                module.rep.running_mean.normal_(generator=generator)
            module.rep.running_var.uniform_(0.5, 2.0, generator=generator)
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_a_folded_model_with_ties_is_the_same_after_saving_and_loading(name: str) -> None:
    transformers: Any = pytest.importorskip("transformers", minversion="5")
    config, options = REAL[name]
    torch.manual_seed(0)
    cls: Any = getattr(transformers, name)
    model: Any = switched(cls(getattr(transformers, config)(**options)))
    ids = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(1))
    example = {"input_ids": ids} if name == "GPT2LMHeadModel" else {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
    result: FoldResult = fold_norms(model, example, outputs=lambda output: output.logits)
    left = [norm.name for norm in result.norms if norm.status not in ("forward", "residual")]
    assert all("router" in str(result) and "layer_norm" in name for name in left), str(result)  # it casts its weight
    assert "final_layer_norm" not in str(left)
    folded: Any = result.model
    assert folded.config.tie_word_embeddings == model.config.tie_word_embeddings

    class Folded(cls):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            apply_manifest(self, result.manifest)

    with tempfile.TemporaryDirectory() as folder:
        folded.save_pretrained(folder)
        loaded, info = Folded.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    loaded.eval().tie_weights()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**example).logits, folded(**example).logits, rtol=1e-5, atol=1e-6)
        expected = model(**example).logits
        assert (loaded(**example).logits - expected).abs().max() < 1e-4 * expected.abs().max()


class TiesByItsCode(Declares):
    """As before transformers 5: names for saving, one flag for all, and a method that ties what it likes."""

    def __init__(self) -> None:
        super().__init__(dict(TIES))
        del self.all_tied_weights_keys
        self._tied_weights_keys: Any = list(TIES)

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            for name in TIES:
                self.get_submodule(name.removesuffix(".weight")).weight = self.get_parameter("shared.weight")


def test_an_older_model_ties_all_others_whenever_it_ties() -> None:
    ids = torch.arange(8).view(2, 4)
    model: Any = ready(TiesByItsCode())
    result = fold_norms(model, ids)
    assert [norm.status for norm in result.norms] == ["forward"]
    assert result.manifest["untied"] == ["head.weight"]
    fresh: Any = apply_manifest(ready(TiesByItsCode()), result.manifest)
    models: list[Any] = [result.model, copy.deepcopy(result.model), fresh]
    for folded in models:
        assert folded.config.tie_word_embeddings
        folded.load_state_dict(result.model.state_dict())
        folded.encoder.weight = nn.Parameter(torch.zeros(V, C))  # as a loader leaves it that knows of the tie
        folded.tie_weights()
        assert folded.encoder.weight is folded.decoder.weight is folded.shared.weight
        assert folded.head.weight is not folded.shared.weight
        torch.testing.assert_close(folded(ids), model(ids), rtol=1e-12, atol=1e-12)
    model.tie_weights()
    assert model.head.weight is model.shared.weight


def test_an_older_model_s_flag_is_switched_off() -> None:
    """A model that ties by the flag alone."""
    model: Any = ready(Declares({"head.weight": "shared.weight"}))
    model._tied_weights_keys = ["head.weight"]
    del model.all_tied_weights_keys
    model.function = lambda m, ids: m.head(m.norm(m.shared(ids)))
    del model.encoder, model.decoder
    folded: Any = fold_norms(model, torch.arange(8).view(2, 4)).model
    assert folded.config.tie_word_embeddings is False
