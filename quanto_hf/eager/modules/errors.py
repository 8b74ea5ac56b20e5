"""The error for a qconfig that does not fit."""


class QConfigError(ValueError, AssertionError):
    """A qconfig, or a module with one, cannot be used. torch's eager mode raises AssertionError in these places."""
