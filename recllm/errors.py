"""The one error that is the user's to mend."""


class UserError(Exception):
    """An error of the input, not of the program: value, expectation, next step. Printed without a traceback."""
