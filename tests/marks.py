"""Which cases of a test are marked `slow`."""

import pytest


def slow_unless(is_fast, cases):
    """Returns cases for `parametrize`; those that are not fast are marked `slow`, and run by `make test-all` only.

    A case that is a tuple stands for several arguments, and is given to `is_fast` as such.
    """
    listed = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=() if is_fast(*case) else pytest.mark.slow) for case in listed]
