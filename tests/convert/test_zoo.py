"""The real packages, where they are installed (extra `zoo`): nothing is downloaded, weights are drawn.

The look-alikes of `tests/families` cover the same ground; this says whether they still look alike.
"""

import copy
import importlib
import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from stabnorm import convert_norms, find_norms
from stabnorm.nn import PRepBN
from tests.families import randomize_

pytestmark = pytest.mark.filterwarnings("default")  # the packages' own warnings are theirs

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA = SMALL | {"head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VIT = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 4}
SWIN = {"img_size": 64, "depths": (2, 2), "embed_dim": 24, "num_heads": (2, 4)}

TIMM: dict[str, tuple[str, dict[str, Any], int]] = {
    "deit": ("deit_tiny_patch16_224", VIT, 32),
    "deit, distilled": ("deit_tiny_distilled_patch16_224", VIT, 32),
    "vit, mean pool and fc_norm": ("vit_tiny_patch16_224", VIT | {"global_pool": "avg", "class_token": False}, 32),
    "vit, qk-norm": ("vit_tiny_patch16_224", VIT | {"qk_norm": True}, 32),
    "swin": ("swin_tiny_patch4_window7_224", SWIN | {"window_size": 4}, 64),
    "swin, padded windows": ("swin_tiny_patch4_window7_224", SWIN | {"window_size": 7}, 64),
    "swin v2": ("swinv2_tiny_window8_256", SWIN | {"window_size": 4}, 64),
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}, 64),
    "convnext, linear": ("convnext_tiny", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}, 64),
    "pvt v2": ("pvt_v2_b0", {"depths": (1, 1, 1, 1)}, 64),
    "mixer": ("mixer_s32_224", {"img_size": 64}, 64),
    "eva-02": ("eva02_tiny_patch14_224", VIT, 32),
}
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt-2": ("GPT2Config", "GPT2LMHeadModel", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", LLAMA),
    "llama, tied head": ("LlamaConfig", "LlamaForCausalLM", LLAMA | {"tie_word_embeddings": True}),
    "qwen 3": ("Qwen3Config", "Qwen3ForCausalLM", LLAMA),
    "olmo 2": ("Olmo2Config", "Olmo2ForCausalLM", LLAMA),
    "gemma 2": ("Gemma2Config", "Gemma2ForCausalLM", LLAMA),
    "bert": ("BertConfig", "BertForSequenceClassification", SMALL),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", SMALL),
    "distilbert": ("DistilBertConfig", "DistilBertModel", {
        "vocab_size": 64, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4,
    }),
    "albert": ("AlbertConfig", "AlbertModel", SMALL | {"embedding_size": 16}),
    "t5": ("T5Config", "T5ForConditionalGeneration", {
        "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
    }),
    "vit": ("ViTConfig", "ViTForImageClassification", SMALL | {"image_size": 32, "patch_size": 8}),
    "whisper": ("WhisperConfig", "WhisperForConditionalGeneration", {
        "vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 8,
        "max_source_positions": 10, "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None,
    }),
}  # fmt: skip


def built(package: str, name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install 'stabnorm[zoo]'")
    library = importlib.import_module(package)
    torch.manual_seed(0)
    if package == "timm":
        model_name, options, size = TIMM[name]
        return library.create_model(model_name, num_classes=5, **options), {"x": torch.randn(2, 3, size, size)}
    config, model_class, options = TRANSFORMERS[name]
    model = getattr(library, model_class)(getattr(library, config)(**options))
    ids = torch.randint(3, 64, (2, 7))
    inputs = {"input_ids": ids}
    if name == "vit":
        inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    elif name == "whisper":
        inputs = {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": ids}
    elif name == "t5":
        inputs["decoder_input_ids"] = ids.flip(0)[:, :5]
    return model, inputs


def run(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    torch.manual_seed(1)  # the same units drop out
    output = model(**inputs)
    output = output.to_tuple() if hasattr(output, "to_tuple") else output
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def gradients(model: nn.Module, outputs: list[Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    upstream = [torch.randn(y.shape, generator=generator) for y in outputs if y.requires_grad]
    torch.autograd.backward([y for y in outputs if y.requires_grad], upstream)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "name"), [("timm", name) for name in TIMM] + [("transformers", name) for name in TRANSFORMERS]
)
def test_a_real_model_is_converted_whole_and_without_a_change(package: str, name: str) -> None:
    plain, inputs = built(package, name)
    randomize_(plain, seed=1)
    model = copy.deepcopy(plain)
    report = convert_norms(model)
    assert report.converted
    assert report.left == {}
    assert [layer.name for layer in find_norms(model)] == report.converted
    for training in (False, True):
        before, after = (run(each.train(training), inputs) for each in (plain, model))
        assert len(before) == len(after) > 0
        assert all(torch.equal(*each) for each in zip(before, after, strict=True))
    theirs, ours = gradients(plain, before), gradients(model, after)
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    for parameter, gradient in theirs.items():
        torch.testing.assert_close(ours[parameter], gradient, rtol=1e-4, atol=1e-6 * largest)
    randomize_(model, seed=2).load_state_dict(plain.state_dict())
    eval_before = run(plain.eval(), inputs)
    assert all(torch.equal(*each) for each in zip(run(model.eval(), inputs), eval_before, strict=True))
    model.load_state_dict(model.state_dict())
    for module in model.modules():
        if isinstance(module, PRepBN):
            module.lam.zero_()
    changed = run(model, inputs)
    assert all(y.isfinite().all() for y in changed)
    assert not any(torch.allclose(*each, rtol=1e-2) for each in zip(changed, eval_before, strict=True))
