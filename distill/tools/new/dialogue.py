"""Ask for what flags did not give: a line of explanation, a question with its default, and again after a wrong answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import typer

from distill.errors import UserError
from distill.printable import printable

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Question:
    """A question. flag: that answers it too. words: what is asked. help: one line of explanation."""

    flag: str
    words: str
    help: str


@dataclass(slots=True)
class Dialogue:
    """Answers by flags, by the user or by default. asks: whether there is a user to ask."""

    asks: bool

    def settle(
        self, question: Question, given: str | None, read: Callable[[str], Answer], default: str | None = None
    ) -> Answer:
        """Return the answer that `read` accepts: the flag's, the user's, or the default.

        read: raises UserError for a wrong answer, which is said and asked again; without a user it ends the command.
        """
        text = given
        while True:
            if text is None:
                text = self._ask(question, default)
            try:
                return read(text.strip())
            except UserError as error:
                if not self.asks:
                    raise error.within(f"{question.flag}: {error}") from None
                typer.secho(f"  {printable(str(error))}", fg="red", err=True)
                text = None

    def _ask(self, question: Question, default: str | None) -> str:
        if not self.asks:
            if default is None:
                raise UserError(f"{question.flag} is needed: {question.help}")
            return default
        typer.echo()
        typer.secho(question.help, dim=True)
        return str(typer.prompt(question.words, default=default))

    def say(self, text: str = "", *, strong: bool = False) -> None:
        """Print a line."""
        typer.secho(printable(text), bold=strong)


def whole_number(least: int, most: int, what: str) -> Callable[[str], int]:
    """Return a reader of whole numbers from `least` to `most`. what: is counted, for the message."""

    def read(text: str) -> int:
        plain = text.replace(",", "").replace("_", "")
        if not plain.isdigit() or not least <= int(plain) <= most:
            raise UserError(f"{text!r}: give a whole number from {least:,} to {most:,}: {what}.")
        return int(plain)

    return read


def one_of(*names: str) -> Callable[[str], str]:
    """Return a reader of one of some names, or of the start of one."""

    def read(text: str) -> str:
        found = [name for name in names if text and name.startswith(text.lower())]
        if len(found) != 1:
            raise UserError(f"{text!r}: answer {' or '.join(names)}.")
        return found[0]

    return read
