"""Errors that are addressed to the user: one line that says what, where and what to do."""


class UserError(Exception):
    """A mistake outside the program (configuration, data, files): shown as one line, without a traceback."""

    exit_code = 1
    agreed: bool = False
    """Every rank raises it, so one of them reports it."""


class ConfigError(UserError):
    """A configuration that cannot be run. The message names the key, the value and the rule."""

    exit_code = 2


class PeerError(UserError):
    """Another rank died, hung or failed, and this one ends because of it. The message names the other rank.

    The exit code is sysexits' EX_TEMPFAIL: the same command goes on from the last checkpoint.
    """

    exit_code = 75


class DataError(UserError):
    """Training data that is missing, damaged or of the wrong kind. The message names the file."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or belongs to another model. The message names the path."""


class HuggingFaceError(UserError):
    """A Hugging Face model that is missing, damaged or of a kind that moetrain has not, or a model of ours that has no
    place there. The message names the file or the key."""


class TraceError(UserError):
    """A routing trace that is missing, damaged or of another model. The message names the file."""


class PlacementError(UserError):
    """A placement that does not exist or does not fit. The message names the file or the key."""
