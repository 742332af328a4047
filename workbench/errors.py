"""What can go wrong for a user, in three classes.

WorkbenchError
├── CheckpointError   a file, a config or a tensor is not what it should be
├── BudgetError       memory: it does not fit, and this is the smallest that would
└── RequestError      what was asked cannot be done: a prompt, a setting, a message

Every message says what was wrong, where, and what to do.
"""


class WorkbenchError(Exception):
    """Base of every error raised on purpose."""


class CheckpointError(WorkbenchError):
    """A checkpoint directory, its config, its tokenizer or one of its tensors is not usable."""


class BudgetError(WorkbenchError):
    """Something does not fit into the memory it was given."""


class RequestError(WorkbenchError):
    """A prompt, a message or a setting that cannot be carried out."""
