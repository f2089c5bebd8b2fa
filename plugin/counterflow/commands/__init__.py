"""The ``counterflow`` command: a file for each of its commands, which parses, calls one function and prints."""
