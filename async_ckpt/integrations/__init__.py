"""async_ckpt inside other people's training loops: one module a library, each in an extra of its name."""
