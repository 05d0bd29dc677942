"""Does it fit? Memory of a checkpoint at a precision, predicted from its header before a byte of weights is read.

In: a Header, a row, a batch. Out: a FitPrediction in bytes, a verdict against free memory, the largest batch, and the
row that `auto` takes. One formula for every row of the reference engine (transformers' generate):

    weights   linear weights in the row's format, everything else in 16 or 32 bits
    caches    keys and values of the audio (1500 positions a layer) and of the text, for every window of the batch
    working   the larger of two moments: encoding (activations of one layer) and decoding (encoder output, logits)

The fast engine takes its caches at full length when a batch of that size first comes (on a GPU for 1, 2, 4, ... 32
windows), 8-bit ones for packed rows; its working set is the larger of the encoder's graph and of projecting one
window's keys and values for all layers. Counted from its tensors (fast/slots.py, fast/encoder.py), not fitted.

Where the constants come from: torch's allocator on an H200 at large-v3 shape, MiB, weights counted and peak in use:

    batch 1, 64 tokens    fp32 5888/6420  fp16-autocast 5888/7957  fp16, bf16 2944/3227  bnb-int8 1547/1831
                          bnb-nf4, bnb-fp4 867/1151
    batch 32, 128 tokens  fp16 2944/11353  bnb-int8 1548/9917  bnb-nf4 867/9274 (932/9339 without double quantisation)

Only the CUDA context, kept apart because every program on a card pays it, is a round figure. On a CPU the tensors are
the same, but the heap gives little back between the two moments: they add up, and the encoder's count several times
(cpu_heap). Beyond the process before the load at small shape, MiB, measured / predicted:

    fast engine           fp32 1227/1293  bf16 627/646  int8 980/931  int8-dynamic 947/931  bnb-nf4 628/666
    reference engine      fp32 1147/1172  bf16 552/587  bnb-int8 608/668  bnb-nf4 600/545  int8-dynamic 949/931
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from errors import OptionError, UnavailablePrecisionError
from model_loader.device import DeviceInfo
from model_loader.header import Header
from model_loader.precision import PRECISIONS, Precision, by_accuracy

MIB = 2**20
DEFAULT_BATCHES = {"cuda": 16, "cpu": 4}
"""Windows decoded together where nobody says, by kind of device. On a CPU a larger batch gains nothing."""
MAX_BATCH = 256
"""Largest batch that is planned for the reference engine."""
FAST_ROWS = 32
"""Windows that the fast engine decodes together, at most (fast/slots.py; a test compares them). More memory than those
need does not make its batch larger."""
PROMPT_TOKENS = 4
TOKENS = 224
"""New tokens of a window, at most: half the decoder's positions, as Whisper decodes."""

MARGIN = 1.1
"""Green from here on: the prediction is held to within 10 % of what was measured."""

_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_WORKSPACE_BYTES = {True: 32 * MIB, False: 8 * MIB + MIB // 8}
"""cuBLAS's, by 'is Hopper or newer' (torch, getChosenWorkspaceSize)."""
_CONTEXT_BYTES = 600 * MIB
"""CUDA's context and torch's kernels on one card."""
_LOGITS_COPIES = 8
"""float32 [batch, n_vocab] alive at once while a token is chosen: logits, masked twice, log-probabilities of two
steps, and what transformers keeps."""


@dataclass(frozen=True, slots=True)
class _Layers:
    """What the linear layers of one class need beside their weights."""

    output_bytes: int
    """For every output: scales, and biases kept in more bits."""
    unpacked: int
    """Layers unpacked to the computing format at once; PackedLinear, which our step reads as it is, on the reference
    engine only."""
    accumulates: bool
    """Products are held as int32 before they are scaled."""
    decoder_only: bool = False
    """The encoder and the projections of the audio's keys and values stay in the kept format."""
    layer_bytes: int = 0
    """For every layer: tables of its format."""
    reads_whole: bool = False
    """The checkpoint is read in the kept format and converted afterwards, which is a load's peak."""
    cpu_heap: float = 2.5
    """On a CPU, times the encoder's activations: its heap keeps what they freed, in pieces, while tokens are chosen."""


_LAYERS: dict[str, _Layers] = {
    "Linear": _Layers(0, 0, False),
    "Linear8bitLt": _Layers(4, 1, True, cpu_heap=7.0),
    "Linear4bit": _Layers(0, 1, False, layer_bytes=(16 + 256) * 4),
    "PackedLinear": _Layers(7, 2, False, decoder_only=True, reads_whole=True),
    "Int8Linear": _Layers(8, 0, True, reads_whole=True, cpu_heap=5.0),
}
_UNKNOWN_LAYERS = _Layers(4, 1, True, reads_whole=True, cpu_heap=7.0)
"""For a new row with a class of its own: the careful assumption."""


@dataclass(frozen=True, slots=True)
class FitPrediction:
    """Bytes on the device for one model, precision and batch."""

    model: str
    precision: str
    batch: int
    weights_bytes: int
    cache_bytes: int
    """Keys and values of audio and text, for the whole batch."""
    working_bytes: int
    """At the peak, beyond weights and caches."""
    peak_bytes: int
    """Highest use while it works: torch's allocator on a GPU, resident memory beyond the process before on a CPU."""
    load_peak_bytes: int
    """Highest use while it loads and converts."""
    context_bytes: int
    """CUDA's context, paid once per program; 0 on a CPU."""
    engine: str = "reference"
    """Which engine would run it: reference or fast."""

    @property
    def needed_bytes(self) -> int:
        """What must be free, the context apart."""
        return max(self.peak_bytes, self.load_peak_bytes)


@dataclass(frozen=True, slots=True)
class Verdict:
    """green: fits; amber: fits if the prediction is exact; red: does not fit."""

    colour: str
    sentence: str

    @property
    def warning(self) -> str:
        """Before a load: a sentence or two where it may not fit; empty where it does."""
        if self.colour == "red":
            return f"{self.sentence} It is tried all the same, as this is only a prediction."
        return self.foretold and self.sentence

    @property
    def foretold(self) -> str:
        """After a load, whether it worked or not."""
        return "" if self.colour == "green" else f"Before the load: {self.sentence}"


@dataclass(frozen=True, slots=True)
class FitRow:
    """One precision of one model on one device."""

    precision: str
    unavailable: str | None
    """Why the device cannot run it, a sentence; the rest is then None."""
    prediction: FitPrediction | None
    verdict: Verdict | None
    max_batch: int
    """Largest batch that fits with the margin and that the row's engine decodes; 0 where none does."""


@dataclass(frozen=True, slots=True)
class Foresight:
    """What is known of a load before a byte of its weights is read."""

    header: Header
    """Of the checkpoint."""
    stored: Header
    """Of the folder that the row's weights lie in: another one where they were calibrated before."""
    row: Precision
    choice: str | None
    """Why this row, in a sentence, where 'auto' chose it."""
    prediction: FitPrediction
    """For the batches that the program will decode."""
    verdict: Verdict
    """On this prediction. A load is never refused for it: it is a prediction."""


@dataclass(frozen=True, slots=True)
class PrecisionChoice:
    """What `auto` took, and why, in a sentence."""

    row: Precision
    reason: str


def predict(
    header: Header,
    row: Precision,
    batch: int = 1,
    *,
    tokens: int = TOKENS,
    device: DeviceInfo | None = None,
    engine: str = "reference",
) -> FitPrediction:
    """batch: windows decoded together. tokens: new tokens of each. device: a Hopper GPU where none is given.

    engine: reference, fast, or auto: fast for the rows that it runs. Raises OptionError for a batch below 1.
    """
    if batch < 1:
        raise OptionError(f"A batch of {batch} windows cannot be planned; give 1 or more.")
    kind = device.kind if device else "cuda"
    layers = _LAYERS.get(row.linear_class, _UNKNOWN_LAYERS)
    kept = _ITEM_BYTES[row.kept_dtype_on(kind)]
    states = _ITEM_BYTES[row.compute_dtype_on(kind)]  # of what layers return, and so of the caches
    weights = _weights_bytes(header, row, layers, kept)
    is_fast = row.engine(engine) == "fast"
    workspace = 0 if kind == "cpu" else _WORKSPACE_BYTES[device is None or (device.capability or (0, 0)) >= (9, 0)]
    if is_fast:
        cache, encoding, decoding = _fast_bytes(header, layers, batch, kept, states, on_gpu=kind != "cpu")
    else:
        cache, encoding, decoding = _reference_bytes(header, row, layers, batch, tokens, kept, states)
    working = cache + decoding + round(layers.cpu_heap * encoding) if kind == "cpu" else max(encoding, cache + decoding)
    peak = weights + workspace + working
    read = _read_bytes(header, row, layers, kept) + header.largest * 4
    # The fast engine joins the projections of all layers' audio keys and values: for a moment they are there twice.
    joined = header.cross_kv * kept if is_fast and row.linear_class in ("Linear", "PackedLinear") else 0
    return FitPrediction(
        model=header.name,
        precision=row.name,
        batch=batch,
        weights_bytes=weights,
        cache_bytes=cache,
        working_bytes=max(peak - weights - cache, 0),
        peak_bytes=peak,
        load_peak_bytes=max(weights + joined, read),
        context_bytes=_CONTEXT_BYTES if kind == "cuda" else 0,
        engine="fast" if is_fast else "reference",
    )


def verdict(prediction: FitPrediction, free_bytes: int) -> Verdict:
    """free_bytes: on the device for this program's tensors; a context that is still to come is already taken off."""
    needed = prediction.needed_bytes
    windows = "one window" if prediction.batch == 1 else f"{prediction.batch} windows"
    claim = f"{prediction.precision} of {prediction.model} needs {size(needed)} for {windows} at a time"
    if needed * MARGIN <= free_bytes:
        return Verdict("green", f"{claim}; {size(free_bytes)} are free.")
    if needed <= free_bytes:
        return Verdict("amber", f"{claim}, hardly less than the {size(free_bytes)} that are free: it may just fit.")
    return Verdict("red", f"{claim}, but only {size(max(free_bytes, 0))} are free.")


def max_batch(
    header: Header,
    row: Precision,
    free_bytes: int,
    *,
    tokens: int = TOKENS,
    device: DeviceInfo | None = None,
    engine: str = "auto",
) -> int:
    """Most windows decoded at a time that fit with the margin; 0 where not even one does.

    Up to FAST_ROWS for rows that run on the fast engine, up to MAX_BATCH for the others.
    """
    low, high = 0, FAST_ROWS if row.engine(engine) == "fast" else MAX_BATCH
    while low < high:
        middle = (low + high + 1) // 2
        found = predict(header, row, middle, tokens=tokens, device=device, engine=engine)
        if verdict(found, free_bytes).colour == "green":
            low = middle
        else:
            high = middle - 1
    return low


def fit_rows(
    header: Header, device: DeviceInfo, free_bytes: int, batch: int = 0, *, engine: str = "auto"
) -> tuple[FitRow, ...]:
    """Every precision, in the table's order. batch: 0 for the device's usual one."""
    batch, rows = batch or DEFAULT_BATCHES[device.kind], []
    for row in PRECISIONS.values():
        reason = unavailable(header, row, device)
        if reason is not None:
            rows.append(FitRow(row.name, reason, None, None, 0))
            continue
        prediction = predict(header, row, batch, device=device, engine=engine)
        largest = max_batch(header, row, free_bytes, device=device, engine=engine)
        rows.append(FitRow(row.name, None, prediction, verdict(prediction, free_bytes), largest))
    return tuple(rows)


def unavailable(header: Header, row: Precision, device: DeviceInfo) -> str | None:
    """Why this device cannot run the row, or this checkpoint has no such weights, a sentence; None where neither is."""
    return lacking(header, row) or row.unavailable(device)


def lacking(header: Header, row: Precision) -> str | None:
    """What a calibrated folder says to every row that needs no calibration, a sentence; None for others."""
    if header.calibrated is None or _needs_preparation(row):
        return None
    takers = " or ".join(name for name, other in PRECISIONS.items() if _needs_preparation(other))
    return (
        f"{header.name} holds calibrated 8-bit weights only. Choose --precision {takers}, or the checkpoint it was "
        "made from."
    )


def foresee(
    header: Header,
    row: Precision | None,
    device: DeviceInfo,
    free_bytes: int,
    *,
    batch: int = 0,
    engine: str = "auto",
) -> Foresight:
    """What a load of this row (None: of the one that auto takes) will need, held against what is free.

    batch: 0 for the device's usual one. Raises UnavailablePrecisionError where the device runs none at all.
    """
    choice = choose_precision(header, device, free_bytes, batch=batch, engine=engine) if row is None else None
    taken = choice.row if choice else row
    assert taken is not None  # one of the two
    prediction = predict(header, taken, batch or DEFAULT_BATCHES[device.kind], device=device, engine=engine)
    found = verdict(prediction, free_bytes)
    if found.colour != "green":
        room = max_batch(header, taken, free_bytes, device=device, engine=engine)
        if room:  # the decoder takes fewer windows where memory runs out
            found = replace(found, sentence=f"{found.sentence} There is room for {room} at a time, which is slower.")
    return Foresight(header, header, taken, choice.reason if choice else None, prediction, found)


def choose_precision(
    header: Header, device: DeviceInfo, free_bytes: int, *, batch: int = 0, engine: str = "auto"
) -> PrecisionChoice:
    """The most accurate row predicted to fit with room for the batch; else the one with room for the most windows.

    Rows that need something prepared for the checkpoint (a calibration) are left to whoever asks for them; a folder
    that was prepared has no other. batch: 0 for the device's usual one. Raises UnavailablePrecisionError where the
    device runs none at all.
    """
    batch, is_prepared = batch or DEFAULT_BATCHES[device.kind], header.calibrated is not None
    of_header = [row for row in by_accuracy() if _needs_preparation(row) is is_prepared]
    runnable = [row for row in of_header if row.refusal(device) is None]
    if not runnable and is_prepared:
        raise UnavailablePrecisionError(str(of_header[0].unavailable(device)))
    if not runnable:
        raise UnavailablePrecisionError(f"{device.label} runs none of the precisions {', '.join(PRECISIONS)}.")
    if is_prepared:
        return _prepared_choice(header, runnable[0], device, free_bytes, batch, engine)
    tried = [verdict(predict(header, row, batch, device=device, engine=engine), free_bytes) for row in runnable]
    windows = "one window" if batch == 1 else f"{batch} windows"
    for row, found in zip(runnable, tried, strict=True):
        if found.colour == "green":
            if row is runnable[0]:
                return PrecisionChoice(row, f"{found.sentence.rstrip('.')}, so auto takes this most accurate row.")
            best = f"{tried[0].sentence.rstrip('.')}"
            return PrecisionChoice(row, f"auto took {row.name}, the most accurate row with room for {windows}: {best}.")
    room = [max_batch(header, row, free_bytes, device=device, engine=engine) for row in runnable]
    needs = [predict(header, row, 1, device=device, engine=engine).needed_bytes for row in runnable]
    index = max(range(len(runnable)), key=lambda i: (room[i], -needs[i]))
    row = runnable[index]
    return PrecisionChoice(
        row,
        f"No precision of {header.name} has room for {windows} in {size(free_bytes)}; auto took {row.name}, which "
        + (f"has room for {room[index]}." if room[index] else f"needs the least ({size(needs[index])})."),
    )


def _prepared_choice(
    header: Header, row: Precision, device: DeviceInfo, free_bytes: int, batch: int, engine: str
) -> PrecisionChoice:
    """Of a calibrated folder, which has one row."""
    found = verdict(predict(header, row, batch, device=device, engine=engine), free_bytes)
    return PrecisionChoice(
        row, f"{header.name} holds calibrated 8-bit weights only, so auto takes {row.name}: {found.sentence}"
    )


def size(n_bytes: int) -> str:
    """'3.2 GiB' or '867 MiB'."""
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / MIB:.0f} MiB"


# --- bytes ------------------------------------------------------------------------------------------------------------


def _weights_bytes(header: Header, row: Precision, layers: _Layers, kept: int) -> int:
    converted = header.encoder_linear + header.decoder_linear
    outputs = header.linear_outputs
    if layers.decoder_only:
        packed = header.decoder_linear - header.cross_kv
        outputs, converted = outputs * packed // max(converted, 1), packed
    if header.calibrated is not None:
        converted -= header.calibrated.wide_linear
        outputs -= header.calibrated.wide_outputs
    left = header.n_weights - converted
    if row.encoder_dtype is not None:  # one byte each there, beside packed layers in the decoder
        small = header.encoder_linear - header.encoder_weights_of(row.encoder_kept)
        left -= small
        converted += small
    n_layers = 6 * header.sizes.encoder_layers + 10 * header.sizes.decoder_layers
    tables = outputs * layers.output_bytes + n_layers * layers.layer_bytes
    return round(converted * row.bytes_per_weight) + tables + left * kept


def _read_bytes(header: Header, row: Precision, layers: _Layers, kept: int) -> int:
    """The model as it is read from the file."""
    if layers.reads_whole and not _needs_preparation(row):
        return header.n_weights * kept
    return _weights_bytes(header, row, layers, kept)


def _reference_bytes(
    header: Header, row: Precision, layers: _Layers, batch: int, tokens: int, kept: int, states: int
) -> tuple[int, int, int]:
    """(caches, working set while encoding, while decoding) of transformers' generate. kept, states: bytes a number."""
    unpacked = layers.unpacked * header.largest * states
    copies = (0, 0)
    if row.autocast:  # 16-bit copies of the weights in use: the encoder's, then the decoder's with the head
        embedding = header.sizes.n_vocab * header.sizes.d_model
        copies = (states * header.encoder_linear, states * (header.decoder_linear + embedding))
    encoding = copies[0] + batch * _encoder_bytes(header, layers, kept, states) + unpacked
    decoding = copies[1] + batch * _decoder_bytes(header, kept) + unpacked
    return batch * _cache_bytes(header, states, tokens), encoding, decoding


def _fast_bytes(
    header: Header, layers: _Layers, batch: int, kept: int, states: int, *, on_gpu: bool
) -> tuple[int, int, int]:
    """The same of the fast engine, whatever the number of tokens: its caches have room for all."""
    sizes = header.sizes
    window = sizes.n_audio_ctx * sizes.d_model
    largest = min(batch, FAST_ROWS)
    rows = 1 << (largest - 1).bit_length() if on_gpu else largest
    encoded = 1 << (largest.bit_length() - 1) if on_gpu else largest
    audio = window * (1 if layers.decoder_only else states)  # packed rows keep it in 8 bits
    text = sizes.n_text_ctx * sizes.d_model * states
    state = sizes.d_model * (12 + 2 * states) + sizes.ffn_dim * (4 + states) + (sizes.n_vocab + sizes.n_text_ctx) * 4
    cache = rows * (2 * sizes.decoder_layers * (audio + text) + state)
    features = sizes.n_mels * 2 * sizes.n_audio_ctx * kept
    unpacked = 0 if layers.decoder_only else layers.unpacked * header.largest * states
    outputs = batch * (window * kept + features)
    # Two streams and the feed-forward layer before and after GELU; the graph's own input and output stay.
    encoding = outputs + encoded * sizes.n_audio_ctx * kept * (2 * sizes.d_model + 2 * sizes.ffn_dim)
    stays = encoded * (window * kept + features) if on_gpu else 0
    projected = 2 * sizes.decoder_layers * window * states
    return cache, encoding + stays + unpacked, outputs + stays + projected + unpacked


def _cache_bytes(header: Header, states: int, tokens: int) -> int:
    """Keys and values of one window, of audio and text, over all decoder layers."""
    sizes = header.sizes
    positions = sizes.n_audio_ctx + min(PROMPT_TOKENS + tokens, sizes.n_text_ctx)
    return 2 * sizes.decoder_layers * positions * sizes.d_model * states


def _encoder_bytes(header: Header, layers: _Layers, kept: int, states: int) -> int:
    """One window in the encoder: three streams as wide as the model, the feed-forward layer before and after GELU."""
    sizes = header.sizes
    inner = 2 * sizes.ffn_dim * states + (sizes.ffn_dim * 4 if layers.accumulates else 0)
    return sizes.n_audio_ctx * (3 * sizes.d_model * kept + inner) + sizes.n_mels * 2 * sizes.n_audio_ctx * kept


def _decoder_bytes(header: Header, kept: int) -> int:
    """One window while tokens are chosen: the encoder's output and the logits' copies."""
    return header.sizes.n_audio_ctx * header.sizes.d_model * kept + _LOGITS_COPIES * header.sizes.n_vocab * 4


def _needs_preparation(row: Precision) -> bool:
    return bool(getattr(row, "needs_calibration", False))
