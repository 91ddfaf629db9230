"""The saver: commits staged checkpoints to storage. Imports neither torch nor numpy, nor the trainer's side."""

__version__ = "0.1.0"
