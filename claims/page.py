"""Run the commands of claims/tables.md, and those of README.md, again and update the tables and figures.

    python -m claims.page

A command is an indented paragraph that calls claims.report, claims.levels or claims.verdicts. The table below it is
replaced by the command's output; the figure is the file of its --out.
"""
import contextlib
import io
import re
import shlex
import sys
from pathlib import Path

from claims import levels, report, verdicts
from support.files import cli, replacing

PAGES = Path("README.md"), Path("claims/tables.md")
MODULES = {"claims.report": report, "claims.levels": levels, "claims.verdicts": verdicts}
COMMAND = re.compile(r"^    python -m (claims\.(?:report|levels|verdicts)\b(?:.*\\\n)*.*)\n(?:\n((?:\|.*\n)+))?",
                     re.MULTILINE)


def words_of(command):
    """A command of the page, perhaps over several lines -> its words."""
    return shlex.split(command.replace("\\\n", " "))


def run(words):
    """The words of a command -> the table that it prints."""
    sys.argv = words
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        MODULES[words[0]].main()
    return "".join(line for line in printed.getvalue().splitlines(keepends=True) if line.startswith("|"))


def updated(match):
    """A command and its table on the page -> the same with the command's current output."""
    try:
        table = run(words_of(match[1]))
    except ValueError as error:
        raise ValueError(f"{match[1]}: {error}") from None
    print(f"{'unchanged' if match[2] in (table, None) else 'changed'}: {match[1]}")
    return match[0] if match[2] is None else match[0].removesuffix(match[2]) + table


def main():
    for path in PAGES:
        page = COMMAND.sub(updated, path.read_text(encoding="utf-8"))
        with replacing(path) as temporary:
            temporary.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    cli(main)
