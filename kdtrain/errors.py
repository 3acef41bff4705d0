"""The one exception a user is meant to read."""


class KdtrainError(ValueError):
    """Something in the recipe, the data or the machine is wrong: one sentence that names it and the way out.

    The command line prints the sentence and ends with `code`; everything else is a defect and keeps its traceback.
    """

    code = 2


class Stopped(KdtrainError):
    """A signal told the run to stop, and it has saved what it had."""

    def __init__(self, sentence: str, signal: int = 15) -> None:  # pickle makes it without
        super().__init__(sentence)
        self.code = 128 + signal
