"""Whether a run has finished work in its folder, new or from an earlier run: the line that ends
it early says what the same command will find."""

_found = False


def begin():
    """A run begins, of which nothing is known."""
    global _found
    _found = False


def note():
    """A finished record, or what stands for several, lies in the run's folder."""
    global _found
    _found = True


def is_some():
    """Whether there is any."""
    return _found
