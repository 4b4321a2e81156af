"""Errors that the user can solve; in a module without imports, so that the command line starts fast."""


class UserError(Exception):
    """An error that the user can solve. The message names the key, file or row, what was wrong and the fix.

    The command line prints it without a traceback and exits with status 2.
    """
