"""The command ``trainer``: one file per subcommand, and `main`, which runs one."""
