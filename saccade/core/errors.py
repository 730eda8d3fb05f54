"""The exceptions saccade raises on purpose: each says what was seen and what to do."""


class SaccadeError(Exception):
    """Base of every error that saccade raises on purpose; a command line prints it without a traceback."""


class InputError(SaccadeError, ValueError):
    """Tensors or arguments that cannot mean anything: wrong shape, mixed dtypes, empty sequence, negative window."""


class PlanError(SaccadeError, ValueError):
    """A plan that cannot be read, or that is for another model."""


class UnsupportedError(SaccadeError, NotImplementedError):
    """A combination that is not served here. Nothing slower or different was run in its place."""


class FileError(SaccadeError, OSError):
    """A file that is missing, truncated or not what its name says."""


class SpaceError(SaccadeError, MemoryError):
    """No room left: host memory, a disk, or a limit that the caller set. Nothing was lost."""


class DamagedError(SaccadeError):
    """Data that is not what was put away: another layer's, or written over."""
