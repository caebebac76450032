"""What a user can get wrong ends in a UserError: one message that names the thing and the way out."""


class UserError(Exception):
    """A fault the user can mend. The message stands alone: it is printed without a traceback and the exit code is 1."""


class ConfigError(UserError):
    """A faulty key or value on the command line or in a config file, found before anything was started."""
