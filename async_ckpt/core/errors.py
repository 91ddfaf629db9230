"""Every error a user of async_ckpt can meet."""


class CheckpointError(RuntimeError):
    """Base of all errors raised by async_ckpt: says what happened, the value, and what to do next."""
