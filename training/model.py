"""A small Whisper for training: size, first weights, forward passes for windows of any length, and the losses.

In: features and labels. Out: losses. The architecture is transformers' WhisperForConditionalGeneration, so the exported
checkpoint needs nothing of this folder.

Three losses, because 20 minutes are too short for the decoder to find out by itself where to listen:
- cross-entropy over tokens, smoothed; a timestamp also accepts its neighbours within 40 ms;
- CTC over the encoder (a linear head that the export drops): the encoder learns letters before the decoder can listen;
- alignment: head 0 of two cross-attentions is taught where each token is spoken, which a synthesiser knows. The same
  heads give word times later (alignment_heads in generation_config.json).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import avg_pool1d, ctc_loss, dropout, gelu, linear, log_softmax

from transcription.tokenizer import TIMESTAMP_STEP_S, WhisperTokens

_N_TIMESTAMPS = 1501
_NEIGHBOUR_WEIGHTS = (0.1, 0.2, 0.4, 0.2, 0.1)
"""Of a timestamp and its neighbours up to two steps away."""
_ALIGN_MARGIN_S = 0.08
_SECONDS_PER_POSITION = TIMESTAMP_STEP_S


@dataclass(frozen=True, slots=True)
class ModelSize:
    """The demo model: 11.2 million parameters, 22.5 MB in 16 bits."""

    d_model: int = 256
    encoder_layers: int = 6
    decoder_layers: int = 4
    heads: int = 4
    n_mels: int = 80


def build_model(size: ModelSize, words: WhisperTokens, n_vocab: int) -> Any:
    """WhisperForConditionalGeneration with random weights.

    Timestamp tokens begin as the encoder's own position vectors (both step by 20 ms), so their order is known at once.
    """
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=n_vocab,
        num_mel_bins=size.n_mels,
        d_model=size.d_model,
        encoder_layers=size.encoder_layers,
        decoder_layers=size.decoder_layers,
        encoder_attention_heads=size.heads,
        decoder_attention_heads=size.heads,
        encoder_ffn_dim=4 * size.d_model,
        decoder_ffn_dim=4 * size.d_model,
        max_source_positions=1500,
        max_target_positions=448,
        dropout=0.0,
        bos_token_id=words.eot,
        eos_token_id=words.eot,
        pad_token_id=words.eot,
        decoder_start_token_id=words.sot,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model: Any = WhisperForConditionalGeneration(config)
    with torch.no_grad():
        positions = model.model.encoder.embed_positions.weight  # [1500, d_model]
        positions = positions - positions.mean(0)
        embeddings, begin = model.model.decoder.embed_tokens.weight, words.timestamp_begin
        embeddings[begin : begin + _N_TIMESTAMPS - 1] = positions * (0.04 / positions.std())
        embeddings[begin + _N_TIMESTAMPS - 1] = embeddings[begin + _N_TIMESTAMPS - 2]
    return model


def encode(encoder: Any, features: torch.Tensor) -> torch.Tensor:
    """WhisperEncoder's forward for windows of any length: [n, n_mels, n_frames] -> [n, n_frames / 2, d_model]."""
    hidden = gelu(encoder.conv1(features))
    hidden = gelu(encoder.conv2(hidden)).permute(0, 2, 1)
    hidden = hidden + encoder.embed_positions.weight[: hidden.shape[1]]
    hidden = dropout(hidden, encoder.dropout, encoder.training)
    for layer in encoder.layers:
        hidden = _first(layer(hidden, None))
    return torch.as_tensor(encoder.layer_norm(hidden))


def decode(decoder: Any, inputs: torch.Tensor, heard: torch.Tensor) -> torch.Tensor:
    """WhisperDecoder's forward without cache: [n, n_tokens] -> [n, n_tokens, d_model]."""
    hidden = decoder.embed_tokens(inputs) + decoder.embed_positions.weight[: inputs.shape[1]]
    hidden = dropout(hidden, decoder.dropout, decoder.training)
    for layer in decoder.layers:
        hidden = _first(layer(hidden, None, heard, past_key_values=None, use_cache=False))
    return torch.as_tensor(decoder.layer_norm(hidden))


def _first(output: Any) -> Any:
    """Layers return a tensor or a tuple that begins with it, depending on the version of transformers."""
    return output[0] if isinstance(output, tuple) else output


def token_loss(
    logits: torch.Tensor, labels: torch.Tensor, timestamp_begin: int, *, smoothing: float = 0.05
) -> torch.Tensor:
    """Mean over labels that are not -100. logits: [n, n_tokens, n_vocab]; labels: [n, n_tokens]."""
    log_probs = log_softmax(logits.float(), -1)
    counts = labels >= 0
    wanted = labels.clamp(min=0)
    is_timestamp = (wanted >= timestamp_begin)[..., None]
    steps = torch.arange(-2, 3, device=labels.device)
    latest = timestamp_begin + _N_TIMESTAMPS - 1
    neighbours = (wanted[..., None] + steps).clamp(timestamp_begin, latest)
    accepted = torch.where(is_timestamp, neighbours, wanted[..., None])
    spread = torch.tensor(_NEIGHBOUR_WEIGHTS, device=labels.device)
    weights = torch.where(is_timestamp, spread, (steps == 0).float())
    loss = -(weights * log_probs.gather(-1, accepted)).sum(-1)
    loss = (1 - smoothing) * loss - smoothing * log_probs.mean(-1)
    return (loss * counts).sum() / counts.sum().clamp(min=1)


class CtcHead(torch.nn.Module):
    """Text tokens on every second encoder position; the blank is the id after the last text token."""

    def __init__(self, d_model: int, n_text: int) -> None:
        super().__init__()
        self.blank = n_text
        self.out = torch.nn.Linear(d_model, n_text + 1)

    def forward(self, heard: torch.Tensor) -> torch.Tensor:
        """[n, n_positions, d_model] -> [n, n_positions / 2, n_text + 1]"""
        pooled = avg_pool1d(heard.transpose(1, 2), 2).transpose(1, 2)
        return torch.as_tensor(self.out(pooled))

    def loss(self, logits: torch.Tensor, text: torch.Tensor, text_lengths: torch.Tensor) -> torch.Tensor:
        """Per token of text. text_lengths stays on the CPU: ctc_loss then copies nothing back from the device."""
        log_probs = log_softmax(logits.float(), -1).transpose(0, 1)  # [n_positions, n, n_text + 1]
        lengths = torch.full((log_probs.shape[1],), log_probs.shape[0], dtype=torch.long)
        losses = ctc_loss(
            log_probs, text, lengths, text_lengths, blank=self.blank, reduction="none", zero_infinity=True
        )
        return losses.sum() / max(1, int(text_lengths.sum()))


def taught_layers(n_decoder_layers: int) -> list[int]:
    """Decoder layers whose cross-attention head 0 is taught to align: the middle ones."""
    return sorted({max(0, n_decoder_layers // 2 - 1), n_decoder_layers // 2} - {n_decoder_layers})


class AlignmentTeacher:
    """Teaches head 0 of two cross-attentions where each token is spoken. It has no parameters of its own."""

    def __init__(self, decoder: Any) -> None:
        self._attentions = [decoder.layers[i].encoder_attn for i in taught_layers(len(decoder.layers))]
        self._queries: dict[int, torch.Tensor] = {}
        for index, attention in enumerate(self._attentions):
            attention.register_forward_pre_hook(self._watch(index), with_kwargs=True)

    def _watch(self, index: int) -> Any:
        def remember(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._queries[index] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

        return remember

    def loss(self, heard: torch.Tensor, spans: torch.Tensor) -> torch.Tensor:
        """Minus the log of the attention inside each token's span, mean over tokens that have one.

        heard: [n, n_positions, d_model]; spans: [n, n_tokens, 2] in seconds, end <= 0 for tokens without sound.
        """
        middles_s = (torch.arange(heard.shape[1], device=heard.device) + 0.5) * _SECONDS_PER_POSITION
        has_span = (spans[..., 1] > 0).float()
        inside = (middles_s >= spans[..., :1] - _ALIGN_MARGIN_S) & (middles_s <= spans[..., 1:] + _ALIGN_MARGIN_S)
        total = heard.new_zeros((), dtype=torch.float32)
        for index, attention in enumerate(self._attentions):
            size = attention.head_dim
            query = linear(self._queries[index], attention.q_proj.weight[:size], attention.q_proj.bias[:size])
            key = linear(heard, attention.k_proj.weight[:size])
            scores = torch.bmm(query * attention.scaling, key.transpose(1, 2)).float()
            in_span = torch.logsumexp(scores.masked_fill(~inside, -1e4), -1)
            share = (in_span - torch.logsumexp(scores, -1)).clamp(min=-20)
            total = total - (share * has_span).sum() / has_span.sum().clamp(min=1)
        self._queries.clear()
        return total / len(self._attentions)
