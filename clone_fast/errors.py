"""Errors that a user can cause, each with a message of one line that says what to do.

Everything a caller may want to catch derives from `CloneFastError`. Wrong arguments of an op raise the built-in
`ValueError` or `TypeError` instead, as any tensor library does. The command line prints these and exits with 2.
"""

from __future__ import annotations


class CloneFastError(Exception):
    """Base of the errors below."""


class PhotoError(CloneFastError):
    """The photo, or a folder of photos, cannot be used."""


class CheckpointError(CloneFastError):
    """A network file cannot be read, written or used for what was asked."""


class BackendError(CloneFastError):
    """A backend that was asked for by name cannot run this call; the message gives the reason."""


class SettingsError(CloneFastError, ValueError):
    """A setting is outside of what the method allows."""


class DivergenceError(CloneFastError):
    """The loss became NaN or infinite before there was any result worth keeping."""


class OutputError(CloneFastError):
    """A file or folder cannot be written."""


class MemoryLimitError(CloneFastError):
    """The device's memory does not hold a stage's first iteration; the message names a setting that would fit."""


class GroupError(CloneFastError):
    """The processes of a run did not come together, or lost one that they cannot do without."""
