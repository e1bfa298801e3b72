"""Errors that are the user's to mend: the command line prints them as one line and exits with 2.

A message says what failed, what was found, what is valid and what to do. Anything that is not a `ToprovarError`
is a defect of toprovar and keeps its traceback.
"""

from __future__ import annotations

__all__ = ["BundleError", "CheckpointError", "FormatError", "InputError", "TargetError", "ToprovarError"]


class ToprovarError(Exception):
    """Base of every error that a user can mend."""


class InputError(ToprovarError, ValueError):
    """An argument or a tensor is not what the function takes."""


class CheckpointError(ToprovarError):
    """A checkpoint is missing, truncated, unsafe to load, or of another backbone."""


class FormatError(ToprovarError):
    """A profile, calibration, plan or manifest does not follow its format, or belongs to another checkpoint."""


class BundleError(ToprovarError):
    """A bundle is incomplete, changed since it was written, or names a file outside its folder."""


class TargetError(ToprovarError):
    """A target (runtime, engine builder, GPU) is not available or cannot run this bundle."""
