"""Errors a user can mend (the command line prints them as one line and exits with status 2), and one that is a bug."""


class PenstockError(Exception):
    """A problem with the input, and what to change.

    Parameters
    ----------
    problem : str
        What is wrong, naming the offending value (and file and line where there is one).
    remedy : str
        What the user should change.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem if not remedy else f"{problem}: {remedy}")
        self.problem = problem
        self.remedy = remedy


class IllegalTransition(RuntimeError):
    """A request was told to do what its stage does not allow: a bug in a world or in the controller."""
