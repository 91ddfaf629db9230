"""The saver: commits staged checkpoints to storage. Imports neither torch nor numpy, nor the trainer's side."""
