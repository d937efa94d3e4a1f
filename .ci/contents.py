"""Checks what is in a wheel, and that one built from the source distribution holds the same files."""

import sys
import zipfile


def names(path: str) -> set[str]:
    """Returns the names of the files in a wheel."""
    with zipfile.ZipFile(path) as wheel:
        return set(wheel.namelist())


here, again = (names(path) for path in sys.argv[1:])
assert here == again, f"the source distribution lacks, or adds, {sorted(here ^ again)}"
assert {"trainer/py.typed", "trainer/commands/digits.py", "trainer/commands/demo.py"} <= here
foreign = {name for name in here if not name.startswith(("trainer/", "nnx_trainer-"))}
assert not foreign, f"the wheel holds {sorted(foreign)}"
assert not {name for name in here if "test" in name.lower()}, "the wheel holds tests"
print(f"{len(here)} files in the wheel")
