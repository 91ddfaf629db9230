"""The saver: commits staged checkpoints to storage. Imports neither torch nor numpy, nor the trainer's side; the verb
`diff` alone, a process of its own, measures with numpy where that is installed."""

__version__ = "0.1.0"
