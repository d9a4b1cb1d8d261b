"""Whatever loads a converted or folded model: the result is right, or somebody says that it is not."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabnorm import apply_manifest, convert_norms, fold_norms
from stabnorm.nn import PRepBN

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

TARGETS = ["prepbn", "repbn", "unified", "power"]
IDS = torch.arange(5)[None]
SMALL = {
    "vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 16,
}  # fmt: skip
CLASSES: dict[str, dict[str, Any]] = {
    "GPT2Model": {"vocab_size": 20, "n_embd": 8, "n_layer": 1, "n_head": 2},
    "BertModel": SMALL,
    "LlamaModel": SMALL | {"head_dim": 4},
    "OlmoModel": SMALL,
    "Gemma2Model": SMALL | {"head_dim": 4},
    "T5EncoderModel": {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2},
}


@pytest.fixture(autouse=True)
def _dirty_memory() -> None:
    """What an empty tensor holds is then no first value by chance."""
    junk = [torch.full((size,), torch.nan) for size in (1, 3, 4, 8, 16, 32) for _ in range(200)]
    del junk


def hugging_face(name: str) -> tuple[type[Any], Any]:
    transformers = pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()
    base = getattr(transformers, name)
    config = base.config_class(**CLASSES[name])
    return base, config


def converting(base: type[Any], to: str = "prepbn") -> type[Any]:
    class Converted(base):  # type: ignore[misc]
        def __init__(self, config: Any, **options: Any) -> None:
            super().__init__(config, **options)
            convert_norms(self, to)

    return Converted


def trained(model: Any, lam: float = 0.3) -> Any:
    """With parameters and statistics that are no first values, at this lam, in eval."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.train()
    for _ in range(3):
        model(input_ids=torch.randint(0, 20, (4, 6), generator=generator))
    for module in model.modules():
        if isinstance(module, PRepBN):
            module.lam.fill_(lam)
    return model.eval()


def output(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS)[0]  # type: ignore[no-any-return]


# --- built on the meta device ---


@pytest.mark.parametrize("name", CLASSES)
def test_from_pretrained_of_a_plain_checkpoint_gives_what_load_state_dict_gives(name: str, tmp_path: Path) -> None:
    base, config = hugging_face(name)
    plain = base(config)
    plain.save_pretrained(tmp_path)
    loaded = converting(base).from_pretrained(tmp_path).eval()
    usual = converting(base)(config).eval()
    usual.load_state_dict(plain.state_dict())
    assert torch.equal(output(loaded), output(plain.eval()))
    for key, tensor in usual.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    loaded.train()(input_ids=IDS)[0].sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in loaded.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("to", TARGETS)
def test_from_pretrained_gives_first_values_to_all_that_a_checkpoint_lacks(to: str, tmp_path: Path) -> None:
    base, config = hugging_face("BertModel")
    base(config).save_pretrained(tmp_path)
    loaded, fresh = (
        model.embeddings.LayerNorm
        for model in (converting(base, to).from_pretrained(tmp_path), converting(base, to)(config))
    )
    for (name, tensor), (_, expected) in zip(loaded.named_buffers(), fresh.named_buffers(), strict=True):
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("to", TARGETS)
def test_from_pretrained_of_a_converted_checkpoint_gives_the_same_model(
    to: str, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    base, config = hugging_face("BertModel")
    model = trained(converting(base, to)(config))
    model.save_pretrained(tmp_path)
    loaded = converting(base, to).from_pretrained(tmp_path, dtype=dtype).eval()
    for key, tensor in model.state_dict().items():
        got = loaded.state_dict()[key]
        assert torch.equal(got, tensor.to(got.dtype)), key
        assert got.dtype == tensor.dtype or key in dict(model.named_parameters())
    if dtype is None:
        assert torch.equal(output(loaded), output(model))


def test_from_pretrained_of_a_folded_checkpoint_gives_the_same_model(tmp_path: Path) -> None:
    base, config = hugging_face("BertModel")
    result: Any = fold_norms(trained(converting(base)(config), lam=0.0), {"input_ids": IDS})

    class Folded(base):  # type: ignore[misc,valid-type]
        def __init__(self, config: Any, **options: Any) -> None:
            super().__init__(config, **options)
            apply_manifest(self, result.manifest)

    result.model.save_pretrained(tmp_path)
    assert torch.equal(output(Folded.from_pretrained(tmp_path).eval()), output(result.model))


def test_the_stock_class_names_the_keys_that_it_drops(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base, config = hugging_face("BertModel")
    trained(converting(base)(config)).save_pretrained(tmp_path)
    report = base.from_pretrained(tmp_path, output_loading_info=True)[1]
    assert any(key.endswith("LayerNorm.lam") for key in report["unexpected_keys"])


class Net(nn.Module):
    def __init__(self, to: str | None = None) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)
        if to:
            convert_norms(self, to)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("assign", [True, False], ids=["assign", "to_empty"])
def test_a_plain_checkpoint_fills_a_model_that_was_built_on_the_meta_device(assign: bool) -> None:
    plain: Any = Net()
    nn.init.uniform_(plain.norm.weight)
    with torch.device("meta"):
        model: Any = Net("prepbn")
    if not assign:
        model._apply(lambda t: torch.full_like(t, 77, device="cpu"))  # to_empty, where the memory held something
    model.load_state_dict(plain.state_dict(), assign=assign)
    usual = Net("prepbn")
    usual.load_state_dict(plain.state_dict())
    for key, tensor in usual.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key
    assert torch.equal(model.norm.rep.weight, plain.norm.weight)  # it starts from the norm that was loaded


@pytest.mark.parametrize("to", TARGETS)
def test_a_loader_that_puts_one_tensor_after_the_other_in_place_is_not_undone_by_a_move(to: str) -> None:
    filled = Net(to)
    for tensor in filled.state_dict().values():
        tensor.fill_(1)
    with torch.device("meta"):
        model = Net(to)
    for name, tensor in filled.state_dict().items():  # as accelerate's load_checkpoint_and_dispatch does
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        if attribute in module._parameters:
            module._parameters[attribute] = nn.Parameter(tensor)
        else:
            module._buffers[attribute] = tensor
    model.to("cpu").eval()
    for name, tensor in filled.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert torch.equal(model(torch.ones(2, 4)), filled.eval()(torch.ones(2, 4)))


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("buffers", ["meta", "cpu"])
def test_a_plain_checkpoint_that_a_loader_puts_in_place_fills_a_converted_model_as_it_moves(
    to: str, buffers: str
) -> None:
    plain: Any = Net()
    nn.init.uniform_(plain.norm.weight)
    with torch.device("meta"):
        model: Any = Net(to)
    if buffers == "cpu":  # as in accelerate's init_empty_weights
        usual = dict(Net(to).named_buffers())
        for module_name, module in model.named_modules():
            for name in module._buffers:
                module._buffers[name] = usual[f"{module_name}.{name}".lstrip(".")]
    for name, tensor in plain.state_dict().items():
        owner, _, attribute = name.rpartition(".")
        model.get_submodule(owner)._parameters[attribute] = nn.Parameter(tensor)
    model.to("cpu")
    expected = Net()
    expected.load_state_dict(plain.state_dict())
    convert_norms(expected, to=to)  # type: ignore[arg-type]
    assert model.state_dict().keys() == expected.state_dict().keys()
    for key, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    model.train()(torch.randn(6, 4)).sum().backward()


def test_a_norm_without_weights_starts_as_a_new_one_where_a_loader_leaves_it_empty() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8, elementwise_affine=False))
        convert_norms(model)
    model[0] = nn.Linear(4, 8)
    model.to("cpu")
    x = torch.randn(3, 4)
    assert torch.equal(model(x), nn.functional.layer_norm(model[0](x), (8,)))


@pytest.mark.parametrize("to", TARGETS)
def test_a_model_that_was_moved_from_the_meta_device_starts_as_a_new_one(to: str) -> None:
    with torch.device("meta"):
        model = Net(to)
    model.to_empty(device="cpu")
    fresh = Net(to)
    for name, buffer in fresh.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name


def test_the_marks_of_a_loader_do_not_reset_a_trained_norm() -> None:
    model: Any = Net("prepbn")
    model(torch.randn(6, 4))
    model.norm.lam.fill_(0.5)
    state = copy.deepcopy(model.state_dict())
    for module in model.modules():
        module._is_hf_initialized = True  # as `init_weights` does at the end
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_a_rep_that_has_seen_a_batch_is_not_changed_by_a_plain_checkpoint() -> None:
    model: Any = Net("prepbn")
    model(torch.randn(6, 4))
    before = model.norm.rep.weight.clone()
    plain = Net()
    nn.init.uniform_(plain.norm.weight)
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model.norm.rep.weight, before)


# --- checkpoints that hold a part ---


@pytest.mark.parametrize("to", TARGETS)
def test_a_checkpoint_without_a_tensor_of_the_norms_is_spoken_of(to: str) -> None:
    model = Net(to)
    with pytest.warns(UserWarning, match=r"holds nothing of \w+ was loaded, so its .*running statistics stay"):
        model.load_state_dict({"last.bias": torch.zeros(2)}, strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(model.state_dict())
        Net("prepbn").load_state_dict(Net().state_dict())


@pytest.fixture
def bert() -> Any:
    base, config = hugging_face("BertModel")
    return base(config)


@pytest.mark.slow
@pytest.mark.parametrize("saved", [True, False], ids=["in modules_to_save", "left out"])
def test_an_adapter_restores_the_norms_that_it_saves_and_warns_of_others(
    bert: Any, saved: bool, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    plain = copy.deepcopy(bert)
    convert_norms(bert)
    modules = ["LayerNorm"] if saved else None
    model = trained(peft.get_peft_model(bert, peft.LoraConfig(target_modules=["query"], modules_to_save=modules)))
    model.save_pretrained(tmp_path)
    convert_norms(plain)
    if not saved:
        with pytest.warns(UserWarning, match="modules_to_save"):
            peft.PeftModel.from_pretrained(plain, tmp_path)
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="a checkpoint that holds nothing")
        loaded = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    norms = [[m for m in each.modules() if isinstance(m, PRepBN)] for each in (loaded, model)]
    for ours, theirs in zip(*norms, strict=True):
        if theirs.rep.step:  # the copy that runs; the original beside it is not saved
            assert ours.lam == theirs.lam
            assert torch.equal(ours.rep.running_mean, theirs.rep.running_mean)


# --- averages ---


def test_an_average_of_weights_folds_once_it_has_the_lam_of_the_model() -> None:
    utils = pytest.importorskip("timm.utils")
    model: Any = Net("prepbn")
    average = utils.ModelEmaV3(model, decay=0.9)
    for step in range(10):
        model(torch.randn(6, 4))
        model.norm.lam.fill_(max(0.0, 1 - step / 4))
        average.update(model)
    assert 0 < average.module.norm.lam < 1  # averaged as the weights are: the fold refuses it
    average.module.norm.lam.copy_(model.norm.lam)
    (norm,) = fold_norms(average.module.eval(), torch.randn(6, 4)).norms
    assert norm.status == "forward"
