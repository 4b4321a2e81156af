"""Errors that are the user's to mend; alone in a module so that the command line starts without numpy."""


class UserError(Exception):
    """Something the user can mend. The message names the key, file or row, what was wrong and the fix.

    The command line prints it without a traceback and exits with status 2.
    """
