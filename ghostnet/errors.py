"""What a user can get wrong ends in a UserError: one message that names the thing and the way out."""


class UserError(Exception):
    """A fault the user can mend. The message stands alone: it is printed without a traceback and the exit code is 1."""


class ConfigError(UserError):
    """A faulty key or value on the command line or in a config file, found before anything was started."""


class SampleError(UserError):
    """What ends a training whose state is whole, and is saved: mostly a sample of the data that can't be read."""


class DataError(SampleError):
    """An error in the code that gives or prepares a sample. The message holds its traceback; it is never skipped."""


class StorageError(UserError):
    """A file of the run that can't be written: a full disk, a read-only or removed folder."""


class PeerFailed(Exception):  # noqa: N818 (the error is another rank's)
    """Another rank can't go on; it says why itself."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the host or a card had no memory left: each of them says so in its own way."""
    # The last is oneDNN's, where there is no room for the code that it makes.
    told = ("can't allocate memory", "out of memory", "bad_alloc", "could not create a primitive")
    return isinstance(error, MemoryError) or any(words in str(error) for words in told)


def explain(error: Exception) -> str | None:
    """A fault that the user can mend in one message; None for a bug of ours."""
    if isinstance(error, UserError):
        return str(error)
    if is_out_of_memory(error):
        return "out of memory. Give a smaller data.batch_size (accumulate=2 keeps the global batch) or eval_batch_size."
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'writing'}: {error.strerror}."
    if lost_peer(error):
        return "another rank is gone: it failed or was killed, and what it said is above."
    return None


def lost_peer(error: Exception) -> bool:
    """Whether it only tells that another rank went away, in the words of gloo, HCCL, NCCL or the ranks' store."""
    words = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited", "Connection was closed")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
