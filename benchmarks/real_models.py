"""Real classes of timm and transformers, switched, trained, folded, saved, loaded: `python -m benchmarks.real_models`.

Every model is built small from a configuration, with random weights; nothing is downloaded. Its norms are converted, it
trains for three steps, lam becomes 0, and it is folded. The error is the largest difference between the outputs before
and after the fold, in float64, relative to the largest output, on inputs of *other* sizes than the example's. "loads"
says whether a fresh model that got the manifest and the saved weights computes the same: through `load_state_dict`, and
for transformers through `save_pretrained` and `from_pretrained`, too. "generates" compares 8 greedy tokens.

Args: NAME ... (default: all; --list prints them), --scale-only (RepBN without a mean), --output FILE.
"""

import argparse
import importlib
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stabnorm import apply_manifest, convert_norms, find_norms, fold_norms
from stabnorm.nn import PRepBN

FOLDED = ("forward", "backward", "residual")
Inputs = dict[str, Any]
Make = Callable[[int, int], Inputs]  # from the batch, and a length or an image's size


@dataclass(frozen=True)
class Entry:
    """A model's class and options, and its inputs: how they are made, and of which (batch, size)."""

    package: str
    name: str
    options: dict[str, Any]
    make: Make
    size: tuple[int, int]
    others: tuple[tuple[int, int], ...]

    def build(self) -> nn.Module:
        """A fresh model, the same each time."""
        torch.manual_seed(0)
        library: Any = importlib.import_module(self.package)
        model: nn.Module
        if self.package == "timm":
            model = library.create_model(self.name, num_classes=5, **self.options)
        else:
            model = getattr(library, self.name)(self.config(library))
        return model

    def config(self, library: Any) -> Any:
        """The configuration of a model of transformers."""
        options = dict(self.options)
        return getattr(library, options.pop("config"))(**options)


# --- inputs ---


def _drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _ids(batch: int, length: int) -> Tensor:
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(batch + length))


def tokens(batch: int, length: int) -> Inputs:
    """For a language model."""
    return {"input_ids": _ids(batch, length)}


def two_texts(batch: int, length: int) -> Inputs:
    """For an encoder and decoder."""
    return {"input_ids": _ids(batch, length), "decoder_input_ids": _ids(batch, length - 2)}


def pixels(batch: int, size: int) -> Inputs:
    """Images of transformers."""
    return {"pixel_values": _drawn(batch, 3, size, size)}


def images(batch: int, size: int) -> Inputs:
    """Images of timm."""
    return {"x": _drawn(batch, 3, size, size)}


def sounds(batch: int, length: int) -> Inputs:
    """Raw waveforms."""
    return {"input_values": _drawn(batch, 100 * length)}


def pictures_and_texts(batch: int, length: int) -> Inputs:
    """For a model of both."""
    return {"input_ids": _ids(batch, length), "pixel_values": _drawn(batch, 3, 32, 32)}


# --- models ---

NARROW = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = NARROW | {"num_key_value_heads": 2, "head_dim": 8}
SEQ2SEQ = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip
EXPERTS = GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "pad_token_id": 0}
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
SPEECH = NARROW | {
    "conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 4), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
STATES = {"vocab_size": 64, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 4, "pad_token_id": 0,
          "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
VIT = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 4}


def _hf(config: str, name: str, options: dict[str, Any], make: Make = tokens, **more: Any) -> Entry:
    return Entry("transformers", name, {"config": config, **options, **more}, make, (2, 7), ((1, 5), (3, 11)))


def _hf_images(config: str, name: str, options: dict[str, Any], *others: tuple[int, int], **more: Any) -> Entry:
    options = {"config": config, "num_labels": 5, **options, **more}
    return Entry("transformers", name, options, pixels, (2, 32), others or ((1, 32), (3, 32)))


def _timm(name: str, size: int = 64, *others: tuple[int, int], **options: Any) -> Entry:
    return Entry("timm", name, options, images, (2, size), others or ((1, size), (3, size)))


MODELS: dict[str, Entry] = {
    "bart": _hf("BartConfig", "BartForConditionalGeneration", SEQ2SEQ, two_texts),
    "mbart": _hf("MBartConfig", "MBartForConditionalGeneration", SEQ2SEQ, two_texts),
    "marian": _hf("MarianConfig", "MarianMTModel", SEQ2SEQ, two_texts),
    "pegasus": _hf("PegasusConfig", "PegasusForConditionalGeneration", SEQ2SEQ, two_texts),
    "m2m-100": _hf("M2M100Config", "M2M100ForConditionalGeneration", SEQ2SEQ, two_texts),
    "blenderbot": _hf("BlenderbotConfig", "BlenderbotForConditionalGeneration", SEQ2SEQ, two_texts),
    "switch transformers": _hf(
        "SwitchTransformersConfig", "SwitchTransformersForConditionalGeneration", T5, two_texts,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_decoder_layers=2, num_experts=4,
        expert_capacity=64, decoder_start_token_id=0,
    ),
    "umt5": _hf("UMT5Config", "UMT5ForConditionalGeneration", T5, two_texts, decoder_start_token_id=0),
    "mamba": _hf("MambaConfig", "MambaForCausalLM", STATES),
    "mamba 2": _hf("Mamba2Config", "Mamba2ForCausalLM", STATES, num_heads=8, head_dim=8, n_groups=1, chunk_size=8),
    "falcon mamba": _hf("FalconMambaConfig", "FalconMambaForCausalLM", STATES),
    "mixtral": _hf("MixtralConfig", "MixtralForCausalLM", EXPERTS),
    "qwen 3 moe": _hf("Qwen3MoeConfig", "Qwen3MoeForCausalLM", GROUPED, num_experts=4, num_experts_per_tok=2,
                      moe_intermediate_size=32),
    "olmoe": _hf("OlmoeConfig", "OlmoeForCausalLM", GROUPED, num_experts=4, num_experts_per_tok=2),
    "cohere": _hf("CohereConfig", "CohereForCausalLM", GROUPED, use_qk_norm=True),
    "opt": _hf("OPTConfig", "OPTForCausalLM", NARROW, ffn_dim=64, word_embed_proj_dim=32),
    "gpt-neox": _hf("GPTNeoXConfig", "GPTNeoXForCausalLM", NARROW),
    "gpt-j": _hf("GPTJConfig", "GPTJForCausalLM", {
        "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4,
        "bos_token_id": 1, "eos_token_id": 2,
    }),
    "bloom": _hf("BloomConfig", "BloomForCausalLM", NARROW, n_layer=2, n_head=4),
    "falcon": _hf("FalconConfig", "FalconForCausalLM", NARROW),
    "phi": _hf("PhiConfig", "PhiForCausalLM", NARROW),
    "phi 3": _hf("Phi3Config", "Phi3ForCausalLM", GROUPED),
    "stable lm": _hf("StableLmConfig", "StableLmForCausalLM", GROUPED),
    "starcoder 2": _hf("Starcoder2Config", "Starcoder2ForCausalLM", GROUPED),
    "gemma": _hf("GemmaConfig", "GemmaForCausalLM", GROUPED),
    "gemma 3": _hf("Gemma3TextConfig", "Gemma3ForCausalLM", GROUPED),
    "nemotron": _hf("NemotronConfig", "NemotronForCausalLM", GROUPED),
    "granite": _hf("GraniteConfig", "GraniteForCausalLM", GROUPED),
    "glm": _hf("GlmConfig", "GlmForCausalLM", GROUPED),
    "persimmon": _hf("PersimmonConfig", "PersimmonForCausalLM", NARROW),
    "electra": _hf("ElectraConfig", "ElectraForSequenceClassification", NARROW, embedding_size=16),
    "deberta v2": _hf("DebertaV2Config", "DebertaV2ForSequenceClassification", NARROW),
    "mpnet": _hf("MPNetConfig", "MPNetForMaskedLM", NARROW),
    "modern bert": _hf("ModernBertConfig", "ModernBertForMaskedLM", NARROW, cls_token_id=1, sep_token_id=2),
    "xlnet": _hf("XLNetConfig", "XLNetForSequenceClassification", {
        "vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64,
    }),
    "funnel": _hf("FunnelConfig", "FunnelForSequenceClassification", {
        "vocab_size": 64, "d_model": 32, "block_sizes": [1, 1], "n_head": 4, "d_head": 8, "d_inner": 64,
    }),
    "clip": _hf("CLIPConfig", "CLIPModel", {
        "text_config": NARROW, "vision_config": VISION, "projection_dim": 16,
    }, pictures_and_texts),
    "dinov2": _hf_images("Dinov2Config", "Dinov2ForImageClassification", VISION, (1, 32), (2, 48)),
    "beit (transformers)": _hf_images("BeitConfig", "BeitForImageClassification", VISION),
    "swin (transformers)": _hf_images("SwinConfig", "SwinForImageClassification", {
        "image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4,
    }),
    "convnext v2": _hf_images("ConvNextV2Config", "ConvNextV2ForImageClassification", {
        "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1],
    }, (1, 48), (3, 64)),
    "segformer": _hf_images("SegformerConfig", "SegformerForImageClassification", {
        "depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 2, 2, 4],
    }, (1, 64), (3, 96)),
    "resnet (transformers)": _hf_images("ResNetConfig", "ResNetForImageClassification", {
        "embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1],
    }, (1, 48), (3, 64)),
    "wav2vec 2": _hf("Wav2Vec2Config", "Wav2Vec2ForCTC", SPEECH, sounds),
    "hubert": _hf("HubertConfig", "HubertForCTC", SPEECH, sounds),
    "wavlm": _hf("WavLMConfig", "WavLMForCTC", SPEECH, sounds),
    "mpt": _hf("MptConfig", "MptForCausalLM", {"vocab_size": 64, "d_model": 32, "n_heads": 4, "n_layers": 2,
                                              "max_seq_len": 64, "bos_token_id": 1, "eos_token_id": 2}),
    "codegen": _hf("CodeGenConfig", "CodeGenForCausalLM", {
        "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_ctx": 64, "rotary_dim": 4,
        "bos_token_id": 1, "eos_token_id": 2,
    }),
    "gpt bigcode": _hf("GPTBigCodeConfig", "GPTBigCodeForCausalLM", {
        "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1,
        "eos_token_id": 2,
    }),
    "gpt-neo": _hf("GPTNeoConfig", "GPTNeoForCausalLM", {
        "vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]],
        "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
    }),
    "qwen 2": _hf("Qwen2Config", "Qwen2ForCausalLM", GROUPED),
    "cohere 2": _hf("Cohere2Config", "Cohere2ForCausalLM", GROUPED),
    "helium": _hf("HeliumConfig", "HeliumForCausalLM", GROUPED),
    "smol lm 3": _hf("SmolLM3Config", "SmolLM3ForCausalLM", GROUPED),
    "xglm": _hf("XGLMConfig", "XGLMForCausalLM", {
        "vocab_size": 64, "d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4,
        "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }),
    "biogpt": _hf("BioGptConfig", "BioGptForCausalLM", NARROW),
    "deberta": _hf("DebertaConfig", "DebertaForSequenceClassification", NARROW),
    "squeezebert": _hf("SqueezeBertConfig", "SqueezeBertForSequenceClassification", NARROW, embedding_size=32),
    "f-net": _hf("FNetConfig", "FNetForMaskedLM", NARROW),
    "nystromformer": _hf("NystromformerConfig", "NystromformerForMaskedLM", NARROW, segment_means_seq_len=64),
    "convbert": _hf("ConvBertConfig", "ConvBertForMaskedLM", NARROW, embedding_size=32),
    "vit msn": _hf_images("ViTMSNConfig", "ViTMSNForImageClassification", VISION),
    "poolformer": _hf_images("PoolFormerConfig", "PoolFormerForImageClassification", {
        "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1],
    }, (1, 64), (3, 96)),
    "siglip": _hf("SiglipConfig", "SiglipModel", {
        "text_config": NARROW | {"max_position_embeddings": 11}, "vision_config": VISION,
    }, pictures_and_texts),
    "beit": _timm("beit_base_patch16_224", 32, **VIT),
    "cait": _timm("cait_xxs24_224", 32, **VIT),
    "xcit": _timm("xcit_nano_12_p8_224", 32, (1, 32), (3, 48), depth=2, embed_dim=32, num_heads=4),
    "levit": _timm("levit_128s", 224),
    "efficientnet": _timm("efficientnet_b0", 64, (1, 96), (3, 64)),
    "mobilenet v3": _timm("mobilenetv3_small_100", 64, (1, 96), (3, 64)),
    "repvgg": _timm("repvgg_a0", 64, (1, 96), (3, 64)),
    "mobileone": _timm("mobileone_s0", 64, (1, 96), (3, 64)),
    "resnet": _timm("resnet18", 64, (1, 96), (3, 64)),
    "resnet v2": _timm("resnetv2_50x1_bit", 64, (1, 96), (3, 64)),
    "regnet": _timm("regnety_002", 64, (1, 96), (3, 64)),
    "densenet": _timm("densenet121", 64, (1, 96), (3, 64)),
    "twins": _timm("twins_svt_small", 64, depths=(1, 1, 1, 1), embed_dims=(16, 32, 48, 64), num_heads=(1, 2, 3, 4)),
    "focalnet": _timm("focalnet_tiny_srf", 64, (1, 96), (3, 64)),
    "mobilevit": _timm("mobilevit_xxs", 64, (1, 96), (3, 64)),
    "edgenext": _timm("edgenext_xx_small", 64, (1, 96), (3, 64)),
    "poolformer v2": _timm("poolformerv2_s12", 64, (1, 96), (3, 64)),
    "fastvit": _timm("fastvit_t8", 64, (1, 96), (3, 64)),
    "efficientformer": _timm("efficientformer_l1", 224),
    "davit": _timm("davit_tiny", 64, (1, 96), (3, 64), depths=(1, 1, 1, 1), embed_dims=(16, 32, 48, 64),
                   num_heads=(1, 2, 3, 4)),
    "mlp-mixer": _timm("mixer_s32_224", 64, img_size=64),
    "resmlp": _timm("resmlp_12_224", 64, img_size=64),
    "visformer": _timm("visformer_tiny", 224),
    "ghostnet": _timm("ghostnet_100", 64, (1, 96), (3, 64)),
    "inception next": _timm("inception_next_atto", 64, (1, 96), (3, 64), depths=(1, 1, 1, 1), dims=(16, 24, 32, 48)),
    "caformer": _timm("caformer_s18", 64, (1, 96), (3, 64)),
    "nest": _timm("nest_tiny", 64, img_size=64),
    "repvit": _timm("repvit_m0_9", 64, (1, 96), (3, 64)),
}  # fmt: skip


# --- what is done to each ---


def switched(entry: Entry, scale_only: bool) -> tuple[nn.Module, int, int]:
    """The model with its norms converted, trained for three steps, and switched; its norms, and how many converted."""
    model = entry.build()
    _draw(model)
    kinds = [norm.kind for norm in find_norms(model)]
    converted = 0
    if "layer" in kinds or "rms" in kinds:
        options: dict[str, Any] = {"center": False} if scale_only else {}
        converted = len(convert_norms(model, **options).converted)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for step in range(3):
        outputs = floating(model(**entry.make(entry.size[0] + step, entry.size[1])))
        loss = torch.stack([y.float().square().mean() for y in outputs]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for module in model.modules():
        if isinstance(module, PRepBN):
            module.lam.zero_()
    return model.eval(), len(kinds), converted


@torch.no_grad()
def _draw(model: nn.Module) -> None:
    """Draw biases and what starts at zero, so that no fault of a fold is multiplied by zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if not bool(parameter.any()) or parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def floating(output: Any) -> list[Tensor]:
    """The floating tensors in an output."""
    leaves = pytree.tree_leaves(output.to_tuple() if hasattr(output, "to_tuple") else output)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


@torch.no_grad()
def difference(one: nn.Module, other: nn.Module, inputs: Sequence[Inputs]) -> float:
    """Largest difference between two models' outputs, relative to the largest output."""
    worst = 0.0
    for each in inputs:
        for y, expected in zip(floating(one(**each)), floating(other(**each)), strict=True):
            known = expected.isfinite()
            error = (y - expected)[known].abs().max() / expected[known].abs().max()
            worst = max(worst, float(error) if torch.equal(known, y.isfinite()) else float("inf"))
    return worst


def doubled(inputs: Inputs) -> Inputs:
    """The inputs in float64."""
    return {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}


def algebra(entry: Entry, model: nn.Module, inputs: Sequence[Inputs]) -> float:
    """The error of a fold in float64. Grouped products have no float64; experts one by one compute the same."""
    config = getattr(model, "config", None)
    if getattr(config, "_experts_implementation", None):
        config._experts_implementation = "eager"  # type: ignore[union-attr]
    folded = fold_norms(model.double(), doubled(entry.make(*entry.size))).model
    return difference(folded, model, [doubled(each) for each in inputs])


def loads(entry: Entry, folded: nn.Module, manifest: dict[str, Any], inputs: Sequence[Inputs]) -> str:
    """Save, load into a fresh model, and compare."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pt"
        torch.save(folded.state_dict(), path)
        fresh = apply_manifest(entry.build(), manifest)
        fresh.load_state_dict(torch.load(path, weights_only=True))
        worst = difference(fresh.eval(), folded, inputs)
        if entry.package == "transformers":
            cls: Any = type(folded)

            def build(self: Any, config: Any) -> None:
                cls.__init__(self, config)
                apply_manifest(self, manifest)

            saved: Any = folded
            saved.save_pretrained(folder)
            again: Any = type(cls.__name__, (cls,), {"__init__": build})
            worst = max(worst, difference(again.from_pretrained(folder).eval(), folded, inputs))
    return "yes" if worst < 1e-6 else f"off by {worst:.0e}"


@torch.no_grad()
def generates(entry: Entry, folded: nn.Module, model: nn.Module) -> str:
    """Compare greedy tokens."""
    can: Any = getattr(model, "can_generate", None)
    if entry.make not in (tokens, two_texts) or can is None or not can():
        return "-"
    inputs = {"input_ids": entry.make(*entry.others[0])["input_ids"]}
    one, other = (
        m.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)  # type: ignore[operator]
        for m in (folded, model)
    )
    return "same" if torch.equal(one, other) else "OTHER TOKENS"


HEAD = ("model", "norms", "converted", "folded", "affine", "kept", "error", "loads", "generates", "seconds")


def row(name: str, scale_only: bool, explain: bool) -> str:
    """One line of the table."""
    entry = MODELS[name]
    model, norms, converted = switched(entry, scale_only)
    started = time.perf_counter()
    result = fold_norms(model, entry.make(*entry.size))
    seconds = time.perf_counter() - started
    counts = Counter("folded" if norm.status in FOLDED else norm.status for norm in result.norms)
    inputs = [entry.make(*size) for size in entry.others]
    if explain:
        print(result)
    loaded = attempt(lambda: loads(entry, result.model, result.manifest, inputs))
    text = attempt(lambda: generates(entry, result.model, model))
    error = attempt(lambda: f"{algebra(entry, model, inputs):.0e}")
    numbers = (norms, converted, counts["folded"], counts["affine"], counts["kept"])
    return f"| {' | '.join((name, *map(str, numbers), error, loaded, text, f'{seconds:.1f}'))} |"


def attempt(function: Callable[[], str]) -> str:
    """What it returns, or in words what goes wrong: one model that fails does not end the table."""
    try:
        return function()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:120]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models; default: all")
    parser.add_argument("--list", action="store_true", help="print the models' names")
    parser.add_argument("--scale-only", action="store_true", help="convert to norms without a mean")
    parser.add_argument("--explain", action="store_true", help="print where every norm went")
    parser.add_argument("--output", type=Path, help="write the table there, too")
    args = parser.parse_args(argv)
    if args.list:
        print("\n".join(MODELS))
        return
    unknown = [name for name in args.names if name not in MODELS]
    if unknown:
        parser.error(f"{unknown[0]!r} is unknown. --list prints the names")
    lines = [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    print("\n".join(lines))
    names = args.names or list(MODELS)
    for number, name in enumerate(names, 1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            line = attempt(partial(row, name, args.scale_only, args.explain))
        lines.append(line if line.startswith("|") else f"| {name} | {line} |")
        print(f"{lines[-1]}  <- {number} of {len(names)}", flush=True)
    if args.output:
        args.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
