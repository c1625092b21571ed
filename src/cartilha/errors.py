"""Every exception that a user can meet; each message says what is wrong and what to do next.

A fault of the user's is a `UserError` (a `ValueError`): the command line prints its one sentence and exits with 2.
An `assert` guards what only a fault of ours can break. `exit_code` is what the process ends with.
"""


class UserError(ValueError):
    """A mistake in what was asked for: one sentence that names the fault and the remedy."""

    exit_code = 2


class UnfinishedError(UserError):
    """Something outside stopped the work half-way; what is done is kept, and the same command goes on."""


class HubUnreachableError(UnfinishedError):
    """A model or dataset of the hub is needed and cannot be had from here."""


class CheckFailedError(RuntimeError):
    """A check of the set-up failed; nothing was trained."""

    exit_code = 3


class OutOfMemoryError(RuntimeError):
    """The device's memory did not suffice; the run is recorded with the status `out_of_memory`."""

    exit_code = 2


class InterruptedRunError(RuntimeError):
    """The run was asked to stop; a checkpoint is saved and the same command with `--resume auto` goes on."""

    exit_code = 75
