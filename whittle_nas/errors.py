"""The one exception for everything that a user can mend."""


class ConfigError(Exception):
    """Wrong input. The message is one sentence: which option or file, its value, what is right.

    The command line prints it on stderr and exits with status 2.
    """
