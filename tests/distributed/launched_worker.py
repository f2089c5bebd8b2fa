"""One rank that runs a script under the launcher: the script's path, then its own arguments."""


def run(argument: list[str]) -> None:
    """Run the script."""
    from counterflow.launch import main

    main(argument)
