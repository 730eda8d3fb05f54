"""The command line: one file per command, and one way to print tables, progress and errors."""
