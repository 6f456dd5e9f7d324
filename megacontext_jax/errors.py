"""The one exception for mistakes a user can mend."""


class UserError(Exception):
    """A bad flag, file, shard or checkpoint.

    The message is one sentence that names the thing and the remedy. Entry points print it without a
    traceback and exit with status 2; anything else that escapes is a bug and keeps its traceback.
    """
