"""Commands run as a user types them, in this process."""

import pytest

from counterflow.commands.main import main


def run_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Return status, output and errors of ``counterflow`` with these words."""
    with pytest.raises(SystemExit) as ended:
        main(argv)
    said = capsys.readouterr()
    code = ended.value.code
    return (code if isinstance(code, int) else 1), said.out, said.err


def check_refusal(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Bad input: status 2, no output, one line that says so."""
    code, out, err = run_command(argv, capsys)
    assert (code, out) == (2, "")
    assert said in err and err.startswith("counterflow: ") and err.count("\n") == 1
