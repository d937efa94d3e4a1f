"""The command ``trainer``: a file for each of its commands, and `main`, which runs one."""
