"""The command line: one subcommand is one library call."""
