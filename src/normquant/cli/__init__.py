"""The command `normquant` and its subcommands, a module each."""

from normquant.cli.entry import COMMANDS, Command, main

__all__ = ["COMMANDS", "Command", "main"]
