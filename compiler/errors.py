"""The project's named exceptions. Everything else that is raised is a bug and propagates."""


class SageError(Exception):
    """Base of every error that sage_compiler raises on purpose."""


class InvalidAttentionError(SageError, ValueError):
    """An attention call whose arguments do not describe an attention."""


class InvalidOptionError(SageError, ValueError):
    """An unknown option, or an option with a value it cannot have."""


class KernelUnavailableError(SageError, RuntimeError):
    """No kernel serves the requested recipe on this device, and emulation was refused."""


class PolicyError(SageError, ValueError):
    """A policy that is malformed, or that does not fit the model it is applied to."""


class UsageError(SageError):
    """A command line that names something that is not there."""


class RewriteError(SageError, RuntimeError):
    """A graph rewrite failed a check; the graph it started from is untouched."""
