"""How messages quote what was found."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, without its full stop; its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(" .:")
