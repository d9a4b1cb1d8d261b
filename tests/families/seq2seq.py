"""Encoder-decoders as Hugging Face writes them: T5 and Whisper."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.families.family import VOCABULARY, Example, Family, merge_heads, source_and_target, split_heads, tensor
from tests.families.family import token_ids as draw_ids

WIDTH, HEADS, LENGTH = 12, 2, 7


class T5LayerNorm(nn.Module):
    """A root mean square norm, whatever its name says."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.to(torch.float32).pow(2).mean(-1, keepdim=True)
        return self.weight * hidden_states * torch.rsqrt(variance + self.variance_epsilon)


class T5Attention(nn.Module):
    """No biases, no scaling."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k = nn.Linear(WIDTH, WIDTH, bias=False)
        self.v = nn.Linear(WIDTH, WIDTH, bias=False)
        self.o = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, memory: Tensor, bias: Tensor | None) -> Tensor:
        q, k, v = split_heads(self.q(x), HEADS), split_heads(self.k(memory), HEADS), split_heads(self.v(memory), HEADS)
        scores = q @ k.transpose(-2, -1)
        scores = scores if bias is None else scores + bias
        return tensor(self.o(merge_heads(scores.softmax(-1) @ v)))


class T5Block(nn.Module):
    def __init__(self, decoder: bool) -> None:
        super().__init__()
        self.layer_norm_self = T5LayerNorm(WIDTH)
        self.SelfAttention = T5Attention()
        if decoder:
            self.layer_norm_cross = T5LayerNorm(WIDTH)
            self.EncDecAttention = T5Attention()
        self.layer_norm_ff = T5LayerNorm(WIDTH)
        self.wi = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.wo = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, bias: Tensor, memory: Tensor | None) -> Tensor:
        normed = self.layer_norm_self(x)
        x = x + self.SelfAttention(normed, normed, bias)
        if memory is not None:
            x = x + self.EncDecAttention(self.layer_norm_cross(x), memory, None)
        return tensor(x + self.wo(F.relu(self.wi(self.layer_norm_ff(x)))))


class T5Stack(nn.Module):
    """The positions' bias belongs to the first block's attention, as in T5."""

    def __init__(self, decoder: bool) -> None:
        super().__init__()
        self.decoder = decoder
        self.relative_attention_bias = nn.Embedding(2 * LENGTH, HEADS)
        self.block = nn.ModuleList([T5Block(decoder) for _ in range(2)])
        self.final_layer_norm = T5LayerNorm(WIDTH)

    def forward(self, x: Tensor, memory: Tensor | None) -> Tensor:
        at = torch.arange(x.shape[1], device=x.device)
        bias = self.relative_attention_bias(at[:, None] - at + LENGTH).permute(2, 0, 1)
        if self.decoder:
            bias = bias.masked_fill(at[:, None] < at, torch.finfo(bias.dtype).min)
        for block in self.block:
            x = block(x, bias, memory)
        return tensor(self.final_layer_norm(x))


class T5(nn.Module):
    """The tied head reads the last norm times d^-0.5."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(VOCABULARY, WIDTH)
        self.encoder = T5Stack(decoder=False)
        self.decoder = T5Stack(decoder=True)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.lm_head.weight = self.shared.weight

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        memory = self.encoder(self.shared(input_ids), None)
        y = self.decoder(self.shared(decoder_input_ids), memory)
        return tensor(self.lm_head(y * WIDTH**-0.5))


class WhisperAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.k_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.v_proj = nn.Linear(WIDTH, WIDTH)
        self.q_proj = nn.Linear(WIDTH, WIDTH)
        self.out_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, memory: Tensor, causal: bool = False) -> Tensor:
        q = split_heads(self.q_proj(x) * (WIDTH // HEADS) ** -0.5, HEADS)
        k, v = split_heads(self.k_proj(memory), HEADS), split_heads(self.v_proj(memory), HEADS)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=1.0)
        return tensor(self.out_proj(merge_heads(y)))


class WhisperLayer(nn.Module):
    def __init__(self, decoder: bool) -> None:
        super().__init__()
        self.decoder = decoder
        self.self_attn = WhisperAttention()
        self.self_attn_layer_norm = nn.LayerNorm(WIDTH)
        if decoder:
            self.encoder_attn = WhisperAttention()
            self.encoder_attn_layer_norm = nn.LayerNorm(WIDTH)
        self.fc1 = nn.Linear(WIDTH, 2 * WIDTH)
        self.fc2 = nn.Linear(2 * WIDTH, WIDTH)
        self.final_layer_norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        normed = self.self_attn_layer_norm(x)
        x = x + self.self_attn(normed, normed, causal=self.decoder)
        if memory is not None:
            x = x + self.encoder_attn(self.encoder_attn_layer_norm(x), memory)
        return tensor(x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x)))))


class WhisperEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(5, WIDTH, 3, padding=1)
        self.conv2 = nn.Conv1d(WIDTH, WIDTH, 3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList([WhisperLayer(decoder=False)])
        self.layer_norm = nn.LayerNorm(WIDTH)

    def forward(self, input_features: Tensor) -> Tensor:
        x = F.gelu(self.conv2(F.gelu(self.conv1(input_features)))).permute(0, 2, 1)
        x = x + self.embed_positions.weight[: x.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return tensor(self.layer_norm(x))


class WhisperDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.embed_positions = nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList([WhisperLayer(decoder=True)])
        self.layer_norm = nn.LayerNorm(WIDTH)

    def forward(self, input_ids: Tensor, memory: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids) + self.embed_positions.weight[: input_ids.shape[1]]
        for layer in self.layers:
            x = layer(x, memory)
        return tensor(self.layer_norm(x))


class Whisper(nn.Module):
    """Every decoder layer's cross-attention reads the encoder's last norm."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = WhisperEncoder()
        self.decoder = WhisperDecoder()
        self.proj_out = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.proj_out.weight = self.decoder.embed_tokens.weight

    def forward(self, input_features: Tensor, decoder_input_ids: Tensor) -> Tensor:
        return tensor(self.proj_out(self.decoder(decoder_input_ids, self.encoder(input_features))))


def _sound_and_ids(generator: torch.Generator, size: int) -> Example:
    (ids,), _ = draw_ids(generator, size)
    return Example((torch.randn(2 + size, 5, 11 + 2 * size, generator=generator), ids), {})


FAMILIES = [
    Family("t5", T5, source_and_target, 12),
    Family("whisper", Whisper, _sound_and_ids, 7),
]
