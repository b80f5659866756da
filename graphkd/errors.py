"""Errors that a user can fix. The command line prints each as one line: the value, the rule it breaks, the remedy."""


class UserError(Exception):
    """Base class of every error that the command line prints as one line instead of a traceback."""


class ConfigError(UserError):
    """A config file or override is wrong, or two configs contradict each other. Lists every mistake, one per line."""


class WeightsError(UserError):
    """Given weights do not fit the network that they are for."""
