"""Planned windows -> what the model hears: sound put together and disturbed, log-mel features, masked stretches.

In: int16 sound of the whole run on the device, tensors of a WindowBatch. Out: features float32 [n, n_mels, n_frames].
Everything runs on the device in a few large operations that never wait for the host. Filters, rooms and noise are
products in the frequency domain.
SpecAugment: Park et al. 2019, arXiv:1904.08779.
"""

from __future__ import annotations

import torch

from audio.constants import FFT_SAMPLES, HOP_SAMPLES, SAMPLE_RATE
from audio.features import mel_filters
from training.dataset import WindowBatch

_PCM_SCALE = 32768.0
_CLEAN_SHARE = 0.15
"""Windows left as they are, so that digital silence is known too."""


def compose(sound: torch.Tensor, batch: WindowBatch) -> torch.Tensor:
    """Waveforms float32 [n, n_samples] in -1..1: for each sample the slot it falls into, linearly interpolated.

    sound: int16 [n_all]. Interpolation also changes the speed, and with it the pitch, by the window's factor.
    """
    device, n = sound.device, batch.sound_offsets.shape[0]
    n_samples = int(batch.window_s * SAMPLE_RATE)
    starts, speed = batch.sound_starts.to(device), batch.speed.to(device)
    time = torch.arange(n_samples, device=device).expand(n, n_samples).contiguous()
    slot = torch.searchsorted(starts, time, right=True) - 1
    is_heard = slot >= 0
    slot = slot.clamp_(min=0)
    position = (time - starts.gather(1, slot)).float() * speed[:, None]
    whole = position.floor()
    fraction = position - whole
    index = whole.long()
    is_heard &= (index >= 0) & (index < batch.sound_lengths.to(device).gather(1, slot) - 1)
    index = torch.where(is_heard, index + batch.sound_offsets.to(device).gather(1, slot), 0)
    left, right = sound[index].float(), sound[(index + 1).clamp(max=len(sound) - 1)].float()
    return torch.where(is_heard, left + fraction * (right - left), 0.0) / _PCM_SCALE


class Augmenter:
    """Rooms, equalisers, band limits, noise, hum and gain for waveforms float32 [n, n_samples]."""

    def __init__(self, device: torch.device, generator: torch.Generator | None = None) -> None:
        self._device, self._generator = device, generator

    def _uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(*shape, device=self._device, generator=self._generator)

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self._device, generator=self._generator)

    def __call__(self, waveforms: torch.Tensor) -> torch.Tensor:
        n, n_samples = waveforms.shape
        spectrum = torch.fft.rfft(waveforms)
        hertz = torch.linspace(0, SAMPLE_RATE / 2, spectrum.shape[1], device=self._device)
        spectrum = spectrum * self._colour(n, hertz) * self._room(n, n_samples)
        disturbed = torch.fft.irfft(spectrum + self._noise(spectrum, hertz, n_samples), n=n_samples)
        disturbed = disturbed + self._hum(n, n_samples)
        disturbed = torch.where(self._uniform(n, 1) < _CLEAN_SHARE, waveforms, disturbed)
        gain = torch.pow(10.0, (-26 + 26 * self._uniform(n, 1)) / 20)
        return (disturbed * gain * 3.0).clamp(-1, 1)

    def _colour(self, n: int, hertz: torch.Tensor) -> torch.Tensor:
        """Amplitude factors [n, n_bins]: an equaliser of ten points in 60 % of windows, telephone bands in 30 %."""
        points = self._normal(n, 10) * 4.0 * (self._uniform(n, 1) < 0.6)
        place = torch.sqrt(hertz / (SAMPLE_RATE / 2)) * 8.999
        left = place.long()
        weight = place - left
        decibels = points[:, left] * (1 - weight) + points[:, left + 1] * weight
        everything = torch.full((n,), 9000.0, device=self._device)
        low_pass = torch.where(self._uniform(n) < 0.3, 3400 + 3600 * self._uniform(n) ** 1.5, everything)[:, None]
        nothing = torch.zeros(n, device=self._device)
        high_pass = torch.where(self._uniform(n) < 0.3, 60 + 260 * self._uniform(n), nothing)[:, None]
        decibels = decibels - 40 * torch.sigmoid((hertz - low_pass) / 120)
        decibels = decibels - 30 * torch.sigmoid((high_pass - hertz) / 20) * (high_pass > 0)
        return torch.pow(10.0, decibels / 20)

    def _room(self, n: int, n_samples: int) -> torch.Tensor:
        """Spectrum [n, n_bins] of an impulse response: exponentially decaying noise, in 35 % of windows."""
        n_tail = min(8000, n_samples)
        time_s = torch.arange(n_tail, device=self._device) / SAMPLE_RATE
        decay_s = 0.08 + 0.45 * self._uniform(n, 1) ** 2
        tail = self._normal(n, n_tail) * torch.exp(-6.9 * time_s / decay_s)
        tail = tail / (tail.norm(dim=1, keepdim=True) + 1e-6) * (self._uniform(n, 1) * 0.55)
        response = tail * (self._uniform(n, 1) < 0.35)
        response[:, 0] += 1.0
        spectrum: torch.Tensor = torch.fft.rfft(response, n=n_samples)
        return spectrum

    def _noise(self, spectrum: torch.Tensor, hertz: torch.Tensor, n_samples: int) -> torch.Tensor:
        """Spectrum of noise with a random slope, 8 to 50 dB under the speech, in 70 % of windows."""
        n = spectrum.shape[0]
        energy = spectrum.abs().square().sum(1, keepdim=True)
        level = (n_samples * torch.pow(10.0, -1.0 - 3.0 * self._uniform(n, 1))) ** 2 / 2
        energy = torch.where(energy < 1.0, level, energy)  # a window without speech: noise at some level
        slope = self._uniform(n, 1) * 1.2
        noise = torch.complex(self._normal(*spectrum.shape), self._normal(*spectrum.shape))
        noise = noise * torch.pow(hertz.clamp(min=40.0) / 1000, -slope)
        noise = noise * torch.sqrt(energy / noise.abs().square().sum(1, keepdim=True))
        distance_db = 8 + 42 * self._uniform(n, 1)
        return noise * torch.pow(10.0, -distance_db / 20) * (self._uniform(n, 1) < 0.7)

    def _hum(self, n: int, n_samples: int) -> torch.Tensor:
        """Mains hum of 50 or 60 Hz and its third harmonic, in 15 % of windows."""
        mains_hz = torch.where(self._uniform(n, 1) < 0.5, 50.0, 60.0)
        time_s = torch.arange(n_samples, device=self._device) / SAMPLE_RATE
        hum = torch.sin(2 * torch.pi * mains_hz * time_s) + 0.5 * torch.sin(6 * torch.pi * mains_hz * time_s + 1)
        return hum * 0.004 * self._uniform(n, 1) * (self._uniform(n, 1) < 0.15)

    def louder_elsewhere(self, n: int) -> torch.Tensor:
        """[n, 1, 1] in log10 units: in a quarter of windows the recording had a louder passage somewhere else."""
        return self._uniform(n, 1, 1) * 0.8 * (self._uniform(n, 1, 1) < 0.25)

    def mask(self, features: torch.Tensor) -> torch.Tensor:
        """SpecAugment: up to two bands of 12 mels and four stretches of 0.25 s become the window's mean."""
        n, n_mels, n_frames = features.shape
        mels = torch.arange(n_mels, device=self._device)[None, :]
        frames = torch.arange(n_frames, device=self._device)[None, :]
        masked = torch.zeros(features.shape, dtype=torch.bool, device=self._device)
        for _ in range(2):
            width = self._uniform(n, 1) * 12 * (self._uniform(n, 1) < 0.5)
            start = self._uniform(n, 1) * n_mels
            masked |= ((mels >= start) & (mels < start + width))[:, :, None]
        for _ in range(4):
            width = self._uniform(n, 1) * 25 * (self._uniform(n, 1) < 0.4)
            start = self._uniform(n, 1) * n_frames
            masked |= ((frames >= start) & (frames < start + width))[:, None, :]
        return torch.where(masked, features.mean(dim=(1, 2), keepdim=True), features)


class TrainingLogMel(torch.nn.Module):
    """audio.features' log-mel for a batch of windows of any length, with the level that the floor hangs from movable.

    Whisper clamps features 8 below the loudest point; in a long recording that point may lie in another window.
    """

    def __init__(self, n_mels: int) -> None:
        super().__init__()
        self.window: torch.Tensor
        self.filters: torch.Tensor
        self.register_buffer("window", torch.hann_window(FFT_SAMPLES))
        self.register_buffer("filters", torch.from_numpy(mel_filters(n_mels)).float())

    def forward(self, waveforms: torch.Tensor, louder: torch.Tensor | None = None) -> torch.Tensor:
        """float32 [n, n_samples] -> [n, n_mels, n_samples / 160]; louder: [n, 1, 1] added to the loudest point."""
        spectrum = torch.stft(waveforms, FFT_SAMPLES, HOP_SAMPLES, window=self.window, return_complex=True)
        power = spectrum[..., :-1].abs() ** 2
        log_mel = (self.filters @ power).clamp(min=1e-10).log10()
        loudest = log_mel.amax(dim=(1, 2), keepdim=True)
        if louder is not None:
            loudest = loudest + louder
        return (torch.maximum(log_mel, loudest - 8.0) + 4.0) / 4.0
