"""The errors gradlab raises. Each derives from the built-in a caller would expect to catch."""


class GradlabError(Exception):
    """Base of every error that gradlab itself raises."""


class BackendError(GradlabError, TypeError):
    """The arguments belong to no framework, or to two."""


class InputError(GradlabError, ValueError):
    """A value of the right kind that the operation cannot take: a wrong shape, structure or option."""


class KindError(GradlabError, TypeError):
    """A value of the wrong kind: an integer where a derivative is asked for, a complex number, a string."""


class StrategyError(GradlabError, ValueError):
    """The strategy asked for by name is known to be wrong, or not to exist, in this place."""


class TooLargeError(GradlabError, MemoryError):
    """The dense result asked for cannot fit in the device's memory."""


class ConvergenceError(GradlabError, RuntimeError):
    """An iteration stopped before it had reached its tolerance, or a linear solve met a singular matrix."""


class ConvergenceWarning(RuntimeWarning):
    """The same, where a warning was asked for."""


class GradientWarning(RuntimeWarning):
    """A derivative is not known to the tolerance asked for."""


class ProcessError(GradlabError, RuntimeError):
    """A process of a group is gone, or does not answer in time."""
