"""Every exception Sotto raises on purpose, in one tree. Imports nothing.

    SottoError                      base: a sentence for the user, an exit code, a stable name
    ├── UserError                   exit code 2: the request cannot be done as given
    │   ├── AudioError              the recording
    │   │   ├── NotAudioError           no decodable sound in it (text file, truncated index, corrupt header)
    │   │   ├── NoAudioTrackError       a video without sound
    │   │   ├── EmptyAudioError         no bytes, or a header without samples
    │   │   └── AudioTooLargeError      over the size or length limit
    │   ├── OptionError             a value outside what is allowed (language, format, beam size, ...)
    │   ├── ModelError              the checkpoint
    │   │   ├── UnknownModelError       no such folder or Hub name
    │   │   ├── NotWhisperError         a checkpoint of another architecture
    │   │   └── ModelUnavailableError   offline, Hub unreachable, gated, download broken off
    │   ├── PrecisionError          the precision
    │   │   ├── UnknownPrecisionError   not a row of the table
    │   │   ├── UnavailablePrecisionError  this device cannot run it; the reason is in the sentence
    │   │   └── CalibrationMissingError    the checkpoint was not calibrated for it yet
    │   └── PortTakenError          another program listens there
    ├── MachineError                exit code 1: the machine's state
    │   ├── OutOfMemoryError            GPU or main memory
    │   ├── DiskFullError               no room for a download or a result
    │   └── DeviceError                 the GPU failed its preflight or broke while running
    │       └── NoSuchDeviceError           exit code 2: asked for by name, and not there or not usable
    ├── EffectivePrecisionError     exit code 1: what is in memory is not what was requested
    └── CancelledError              exit code 1: the user stopped it; finished text is kept

A message says what was given, what is allowed and what to do next.
"""

from __future__ import annotations


class SottoError(Exception):
    """Base of all deliberate errors. `str(error)` is one or two sentences for the user."""

    exit_code = 1


class UserError(SottoError):
    """The request cannot be done as given."""

    exit_code = 2


class AudioError(UserError):
    """Something about the recording."""


class NotAudioError(AudioError):
    """The bytes hold no sound that ffmpeg can decode."""


class NoAudioTrackError(AudioError):
    """A valid media file without an audio track."""


class EmptyAudioError(AudioError):
    """No bytes at all, or a header without samples."""


class AudioTooLargeError(AudioError):
    """Over the configured size or length limit."""


class OptionError(UserError):
    """An option's value is outside what is allowed."""


class ModelError(UserError):
    """Something about the checkpoint."""


class UnknownModelError(ModelError):
    """No such folder or Hub name."""


class NotWhisperError(ModelError):
    """A checkpoint of another architecture."""


class ModelUnavailableError(ModelError):
    """Known, but not to be had now: offline, unreachable, gated, broken off."""


class PrecisionError(UserError):
    """Something about the precision."""


class UnknownPrecisionError(PrecisionError):
    """Not a row of the precision table."""


class UnavailablePrecisionError(PrecisionError):
    """This device cannot run it."""


class CalibrationMissingError(PrecisionError):
    """The precision needs activation ranges that were not measured for this checkpoint yet."""


class PortTakenError(UserError):
    """Another program listens on the requested port."""


class MachineError(SottoError):
    """The state of the machine, not the request."""


class OutOfMemoryError(MachineError):
    """GPU or main memory is exhausted."""


class DiskFullError(MachineError):
    """No room for a download or a result."""


class DeviceError(MachineError):
    """The GPU failed its preflight or broke while running."""


class NoSuchDeviceError(DeviceError):
    """A GPU was asked for that is not there or cannot be used: the request, not the machine, is to be mended."""

    exit_code = 2


class EffectivePrecisionError(SottoError):
    """What is in memory after the load is not what was requested."""


class CancelledError(SottoError):
    """The user stopped the work; finished text is kept."""
