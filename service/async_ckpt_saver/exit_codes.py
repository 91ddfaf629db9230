"""What the exit status of `async-ckpt-saver` says; ended by a signal, a saver dies of that signal."""

OK = 0
ERROR = 1  # it could not be done; the last line on stderr says why and what to do
USAGE = 2  # a flag, a variable or a line of the configuration file is wrong; nothing was done
IN_USE = 3  # run: another saver holds the endpoint
DAMAGE = 4  # verify: a checkpoint is not what was committed
FOUND = 5  # diff: the checkpoints differ; doctor: something will not work

EXPLAINED = {
    OK: "done as asked",
    ERROR: "error: it could not be done",
    USAGE: "wrong usage or configuration",
    IN_USE: "run: another saver holds the endpoint",
    DAMAGE: "verify: damage found",
    FOUND: "diff: they differ; doctor: something will not work",
}
