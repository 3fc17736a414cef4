"""The two kinds of error this project raises on purpose; everything else is a bug."""


class ConfigError(Exception):
    """Bad input, found before any work: printed as one line, exit code 2."""

    def __init__(self, path: str, problem: str, remedy: str) -> None:
        """`path` is the option or file at fault, `problem` names its value, `remedy` says what to do instead."""
        super().__init__(f"{path}: {problem}; {remedy}")
        self.path = path
        self.problem = problem
        self.remedy = remedy


class Infeasible(Exception):
    """A plan that cannot be realised: recorded with its reason, the search goes on."""

    def __init__(self, reason: str, transient: bool = False) -> None:
        """`reason` is one line: the value, the limit it meets, and where; `transient` if it may be otherwise later."""
        super().__init__(reason)
        self.reason = reason
        self.transient = transient


def at_least(least: float, **values: float) -> None:
    """Raises `ConfigError` for the first named value below `least`."""
    for name, value in values.items():
        if value < least:
            raise ConfigError(name, f"is {value}", f"give {least:g} or more")
