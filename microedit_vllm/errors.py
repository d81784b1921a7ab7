"""The one exception that a user's mistake raises."""


class MicroEditError(ValueError):
    """Bad input: its message is one line that says what is wrong and what to do.

    The command line prints it without a traceback and exits with status 2.
    """
