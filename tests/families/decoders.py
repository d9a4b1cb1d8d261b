"""Language models as Hugging Face and nanoGPT write them, with their own norm classes."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.families.family import VOCABULARY, Family, merge_heads, split_heads, tensor, token_ids

WIDTH, HEADS, LENGTH = 12, 2, 7

# --- GPT-2 and nanoGPT ---


class Conv1D(nn.Module):
    """Hugging Face's linear layer of GPT-2: the weight is [in, out]."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.02)
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.nf)


class NanoLayerNorm(nn.Module):
    """NanoGPT's own, with an optional bias."""

    def __init__(self, ndim: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.weight.shape, self.weight, self.bias, 1e-5)


class GptBlock(nn.Module):
    """GPT-2's with `Conv1D`s and torch's norm; nanoGPT's with bias-free linears and its own norm."""

    def __init__(self, nano: bool) -> None:
        super().__init__()

        def linear(width: int, out: int) -> nn.Module:
            return nn.Linear(width, out, bias=False) if nano else Conv1D(out, width)

        self.ln_1 = NanoLayerNorm(WIDTH, bias=False) if nano else nn.LayerNorm(WIDTH)
        self.attn = nn.ModuleDict({"c_attn": linear(WIDTH, 3 * WIDTH), "c_proj": linear(WIDTH, WIDTH)})
        self.ln_2 = NanoLayerNorm(WIDTH, bias=False) if nano else nn.LayerNorm(WIDTH)
        self.mlp = nn.ModuleDict({"c_fc": linear(WIDTH, 2 * WIDTH), "c_proj": linear(2 * WIDTH, WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part, HEADS) for part in self.attn["c_attn"](self.ln_1(x)).split(WIDTH, dim=2))
        x = x + self.attn["c_proj"](merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=True)))
        return tensor(x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh")))


class Gpt(nn.Module):
    """The head is tied to the embedding."""

    def __init__(self, nano: bool = False) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, WIDTH)
        self.wpe = nn.Embedding(LENGTH, WIDTH)
        self.h = nn.ModuleList([GptBlock(nano) for _ in range(2)])
        self.ln_f = NanoLayerNorm(WIDTH, bias=False) if nano else nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.wte(input_ids) + self.wpe(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.h:
            x = block(x)
        return tensor(self.lm_head(self.ln_f(x)))


class LoraLinear(nn.Module):
    """The layout of PEFT: the original layer and a low-rank path, which both read the norm."""

    def __init__(self, base_layer: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base_layer.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return tensor(self.base_layer(x) + 2.0 * self.lora_B(self.lora_A(x)))


def gpt_with_lora() -> nn.Module:
    model = Gpt(nano=True)
    for block in model.h:
        assert isinstance(block, GptBlock)
        for part, name in ((block.attn, "c_attn"), (block.attn, "c_proj"), (block.mlp, "c_fc"), (block.mlp, "c_proj")):
            linear = part[name]
            assert isinstance(linear, nn.Linear)
            part[name] = LoraLinear(linear)
    return model


# --- Llama and what came after it ---


class LlamaRMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(dtype)


class GemmaRMSNorm(nn.Module):
    """The gain is 1 + weight."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def _norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        y = self._norm(x.float())
        return (y * (1.0 + self.weight.float())).type_as(x)


def rotate(x: Tensor) -> Tensor:
    """Rotary positions of [B, heads, L, D]."""
    half = x.shape[-1] // 2
    frequency = 1.0 / 10000 ** (torch.arange(half, device=x.device) / half)
    angle = torch.arange(x.shape[-2], device=x.device)[:, None] * frequency
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


class LlamaAttention(nn.Module):
    """One key-value head for two query heads; `qk_norm` over each head (Qwen3) or the whole projection (OLMo2)."""

    def __init__(self, qk_norm: str | None = None) -> None:
        super().__init__()
        head = WIDTH // HEADS
        self.q_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k_proj = nn.Linear(WIDTH, head, bias=False)
        self.v_proj = nn.Linear(WIDTH, head, bias=False)
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.qk_norm = qk_norm
        if qk_norm is not None:
            self.q_norm = LlamaRMSNorm(head if qk_norm == "head" else WIDTH)
            self.k_norm = LlamaRMSNorm(head)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), split_heads(self.v_proj(x), 1)
        if self.qk_norm == "whole":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.unflatten(-1, (HEADS, -1)), k.unflatten(-1, (1, -1))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q.transpose(1, 2)), rotate(k.transpose(1, 2))
        k, v = (each.expand(-1, HEADS, -1, -1) for each in (k, v))
        return tensor(self.o_proj(merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=True))))


class LlamaMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.up_proj = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down_proj = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return tensor(self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))


class Experts(nn.Module):
    """A mixture whose experts are slices of one Parameter, as in Llama 4 and gpt-oss."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, experts, bias=False)
        self.gate_up_proj = nn.Parameter(torch.randn(experts, WIDTH, 2 * WIDTH) * 0.1)
        self.down_proj = nn.Parameter(torch.randn(experts, WIDTH, WIDTH) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        share = self.router(tokens).softmax(-1).t()[..., None]
        gate, up = torch.bmm(tokens.expand(len(share), -1, -1), self.gate_up_proj).chunk(2, dim=-1)
        return tensor((share * torch.bmm(F.silu(gate) * up, self.down_proj)).sum(0).view(x.shape))


class LlamaLayer(nn.Module):
    """Norms before the branches (Llama, Qwen3), before and after (Gemma 2), or after (OLMo2)."""

    def __init__(
        self, norm: type[nn.Module], before: bool, after: bool, qk_norm: str | None = None, experts: bool = False
    ) -> None:
        super().__init__()

        def norm_if(wanted: bool) -> nn.Module:
            return norm(WIDTH) if wanted else nn.Identity()

        self.self_attn = LlamaAttention(qk_norm)
        self.mlp = Experts() if experts else LlamaMLP()
        self.input_layernorm = norm_if(before)
        self.post_attention_layernorm = norm_if(after)
        self.pre_feedforward_layernorm = norm_if(before)
        self.post_feedforward_layernorm = norm_if(after)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x)))
        return tensor(x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x))))


class CausalModel(nn.Module):
    def __init__(
        self,
        norm: type[nn.Module] = LlamaRMSNorm,
        *,
        before: bool = True,
        after: bool = False,
        qk_norm: str | None = None,
        experts: bool = False,
        tied: bool = False,
        scale: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        self.scale, self.softcap = scale, softcap
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([LlamaLayer(norm, before, after, qk_norm, experts) for _ in range(2)])
        self.norm = norm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids) * self.scale
        for layer in self.layers:
            x = layer(x)
        logits = self.lm_head(self.norm(x))
        return tensor(logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap))


def gemma() -> nn.Module:
    return CausalModel(GemmaRMSNorm, after=True, tied=True, scale=math.sqrt(WIDTH), softcap=30.0)


FAMILIES = [
    Family("gpt-2, tied head", Gpt, token_ids, 5),
    Family("nanogpt, bias-free", lambda: Gpt(nano=True), token_ids, 5),
    Family("nanogpt with lora", gpt_with_lora, token_ids, 5),
    Family("llama", CausalModel, token_ids, 5),
    Family("llama, tied head", lambda: CausalModel(tied=True), token_ids, 5),
    Family("gemma 2", gemma, token_ids, 9),
    Family("qwen 3", lambda: CausalModel(qk_norm="head", tied=True), token_ids, 9),
    Family("olmo 2", lambda: CausalModel(before=False, after=True, qk_norm="whole"), token_ids, 9),
    Family("mixture of experts", lambda: CausalModel(experts=True), token_ids, 5),
]
