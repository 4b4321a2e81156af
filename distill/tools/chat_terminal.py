"""The terminal of `distill chat`: questions are read, replies are streamed, reasoning is dimmed.

With one question given, the answer alone goes to stdout, so that it can be piped; the reasoning goes to stderr if that is a
terminal. Without a terminal every line of stdin is a question.
"""

from __future__ import annotations

import contextlib
import sys

from rich.console import Console

from distill import progress
from distill.errors import UserError
from distill.tools.chat import Chat, FoundModel, Reply, open_chat

HELP = """/reset          forget the conversation
/system TEXT    another system message, and a new conversation (/system alone: none)
/prompt         show the prompt of the next question, as the model reads it
/quit           leave (or Ctrl-D)
Ctrl-C stops a reply; a second one leaves."""


def run(reference: str, *, ask: str | None, system: str | None, temperature: float, max_tokens: int) -> None:
    """Run the verb. Raises UserError for a model that cannot be talked to."""
    with progress.working("loading the libraries") as screen:
        chat, found = open_chat(reference, system=system, temperature=temperature, max_tokens=max_tokens, screen=screen)
    if ask is not None:
        _ask_once(chat, ask)
        return
    _talk(chat, found, Console(highlight=False, soft_wrap=True))


def _ask_once(chat: Chat, question: str) -> None:
    """Print the answer to one question."""
    aside = Console(stderr=True, highlight=False, soft_wrap=True)

    def write(piece: str, thinking: bool) -> None:
        if thinking and aside.is_terminal:
            aside.print(piece, style="dim", end="", markup=False)

    reply = chat.ask(question, write)
    if aside.is_terminal:
        aside.print()
    if reply.stopped:
        raise KeyboardInterrupt
    if reply.answer:
        print(reply.answer)
    if note := _note(chat, reply):
        print(note, file=sys.stderr)


def _note(chat: Chat, reply: Reply) -> str:
    """What is worth saying about how a reply ended."""
    if reply.is_cut:
        inside = "" if reply.answer else " inside its reasoning, before an answer"
        return f"(cut after {reply.tokens} tokens{inside}; --max-tokens {2 * chat.max_tokens} gives it more)"
    return "(an empty answer)" if not reply.answer and not reply.stopped else ""


def _talk(chat: Chat, found: FoundModel, console: Console) -> None:
    """Read questions until the end of stdin, /quit or a second Ctrl-C."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (line editing and history in input())
        console.print(_greeting(chat, found), style="dim", markup=False)
    interrupted = False
    while True:
        try:
            line = input("> " if is_terminal else "").strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            if interrupted:
                break
            interrupted = True
            console.print("\n(Ctrl-C again leaves)", style="dim", markup=False)
            continue
        interrupted = False
        if line in ("/quit", "/exit"):
            break
        if line.startswith("/"):
            _command(chat, line, console)
        elif line:
            interrupted = _reply(chat, line, console)


def _greeting(chat: Chat, found: FoundModel) -> str:
    form = "plain text" if chat.system is None and not chat.tokenizer.chat_template else "its chat template"
    task = f", as in task {found.task}" if found.task else ""
    system = f"\nsystem: {chat.system}" if chat.system else ""
    return f"{found.adapter or found.folder}\nprompts: {form}{task}{system}\n/help lists the commands."


def _reply(chat: Chat, question: str, console: Console) -> bool:
    """Stream one reply; return whether it was interrupted."""

    def write(piece: str, thinking: bool) -> None:
        console.print(piece, style="dim" if thinking else None, end="", markup=False)

    try:
        reply = chat.ask(question, write)
    except UserError as error:
        console.print(f"error: {error}", markup=False)
        return False
    console.print()
    note = "(stopped)" if reply.stopped else _note(chat, reply)
    if note:
        console.print(note, style="dim", markup=False)
    return reply.stopped


def _command(chat: Chat, line: str, console: Console) -> None:
    word, _, rest = line.partition(" ")
    if word == "/reset":
        chat.reset()
        console.print("(a new conversation)", style="dim", markup=False)
    elif word == "/system":
        try:
            chat.use_system(rest.strip() or None)
        except UserError as error:
            console.print(f"error: {error}", markup=False)
    elif word == "/prompt":
        console.print(chat.next_prompt("…"), markup=False)
    else:
        console.print(HELP, markup=False)
