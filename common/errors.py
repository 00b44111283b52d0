"""Errors a user can mend.

The message is one line that says what is wrong, where (key or file), and what to do about it. The command
prints it without a traceback and leaves with `exit_code`; anything else that escapes is a defect of ours.
"""


class UserError(Exception):
    """The work could not be done: exit 1."""

    exit_code = 1


class UsageError(UserError):
    """The request itself is wrong (a flag, a key of a configuration file): exit 2."""

    exit_code = 2
