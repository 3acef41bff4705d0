"""The one exception a user is meant to read."""


class KdtrainError(ValueError):
    """Something in the recipe, the data or the machine is wrong: one sentence that names it and the way out.

    The command line prints the sentence and ends with code 2; everything else is a defect and keeps its traceback.
    """
