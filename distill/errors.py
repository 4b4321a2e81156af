"""The exception for mistakes of the user. A module of its own, so that the command line starts without numpy."""


class UserError(Exception):
    """A mistake that the user can correct. The message names the key, file or row, what is wrong, and the fix.

    The command line prints it without a traceback and exits with status 2.
    """
