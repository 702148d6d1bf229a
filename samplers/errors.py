"""What is raised where a setting does not fit."""


class InvalidValue(ValueError):
    """A setting, `param`, does not fit.

    Attributes:
        code: why, in OpenAI's words.
    """

    def __init__(self, message: str, param: str, code: str = "invalid_value"):
        super().__init__(message)
        self.param, self.code = param, code
