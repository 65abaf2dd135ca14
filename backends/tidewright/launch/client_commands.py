"""`tidewright chat` and `tidewright complete`: a running server at the terminal, token by token."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import click

from tidewright.launch.client import Client, Deltas, Messages, RequestFailedError, Sampling
from tidewright.launch.errors import LaunchError
from tidewright.launch.key_option import key_options

_Command = TypeVar("_Command", bound=Callable[..., Any])

DEFAULT_URL = "http://127.0.0.1:8000"

_USUAL_ENDS = ("stop", "length", "cancelled")


def _generation_options(temperature: float) -> Callable[[_Command], _Command]:
    options = (
        click.option(
            "--url",
            default=DEFAULT_URL,
            show_default=True,
            help="Address of Triton's HTTP port, or of a gateway; either is detected.",
        ),
        key_options,
        click.option(
            "--max-tokens", type=click.IntRange(1), default=256, show_default=True, help="Longest answer, in tokens."
        ),
        click.option(
            "--temperature",
            type=click.FloatRange(0, 100),
            default=temperature,
            show_default=True,
            help="How daring to be; 0 always takes the most likely token.",
        ),
        click.option(
            "--top-p",
            type=click.FloatRange(0, 1, min_open=True),
            default=1.0,
            show_default=True,
            help="Choose among the most likely tokens whose probability reaches this.",
        ),
        click.option("--seed", type=click.IntRange(0), help="Same seed and prompt, same answer."),
        click.option("--stop", multiple=True, help="Text that ends the answer; may be given several times."),
    )

    def add(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


@click.command()
@click.argument("prompt", required=False)
@_generation_options(temperature=0.0)
def complete(prompt: str | None, url: str, key: str | None, **options: Any) -> None:
    """Continue PROMPT, or what comes through standard input.

    The continuation is printed as it is made. Ctrl-C stops it.

    \b
    Examples:
      tidewright complete "Once upon a time"
      tidewright complete --max-tokens 20 --stop . "The capital of France is"
      git diff | tidewright complete
      tidewright complete --url https://gateway.example:8080 --key-file my.key "Once upon a time"
    """
    text = _argument_or_stdin(prompt)
    if not text:
        raise click.UsageError("give a PROMPT, or text through standard input")
    with contextlib.closing(_client(url, key)) as client, _one_line_errors():
        try:
            _print_answer(client.complete(text, _sampling(options)))
        except KeyboardInterrupt:
            click.echo()
            sys.exit(130)


@click.command()
@click.argument("question", required=False)
@click.option("--system", help="Instructions that precede the conversation.")
@_generation_options(temperature=0.7)
def chat(question: str | None, system: str | None, url: str, key: str | None, **options: Any) -> None:
    """Talk with the model.

    With a QUESTION (or text through standard input): answers it and ends. Without: a conversation, in which
    Ctrl-C stops the answer and Ctrl-D ends the program.

    A gateway may require an API key (`tidewright keys` makes them): --key-file, or TIDEWRIGHT_KEY.

    \b
    Examples:
      tidewright chat
      tidewright chat "What is the capital of France?"
      tidewright chat --system "Answer in French." --temperature 0 < question.txt
      tidewright chat --url https://gateway.example:8080 --key-file my.key
    """
    messages = [{"role": "system", "content": system}] if system is not None else []
    sampling = _sampling(options)
    single = _argument_or_stdin(question)
    with contextlib.closing(_client(url, key)) as client:
        if single is None:
            _converse(client, messages, sampling)
            return
        if not single:
            raise click.UsageError("give a QUESTION, or text through standard input")
        with _one_line_errors():
            try:
                _print_answer(client.chat([*messages, {"role": "user", "content": single}], sampling))
            except KeyboardInterrupt:
                click.echo()
                sys.exit(130)


def _converse(client: Client, messages: Messages, sampling: Sampling) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() line editing and a history
    click.echo("Ctrl-C stops an answer, Ctrl-D ends the conversation.", err=True)
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo()
            continue
        if not question:
            continue
        messages.append({"role": "user", "content": question})
        answer: list[str] = []
        try:
            _print_answer(client.chat(messages, sampling), answer)
        except KeyboardInterrupt:
            click.echo()
        except RequestFailedError as error:
            click.echo(f"Error: {error}", err=True)
        # What came before an interruption was said; a question without any answer was not asked.
        if answer:
            messages.append({"role": "assistant", "content": "".join(answer)})
        else:
            messages.pop()


def _print_answer(deltas: Deltas, answer: list[str] | None = None) -> None:
    """Print the answer as it comes, and append its deltas to `answer`."""
    # Closing the iterator closes the connection, also on Ctrl-C, and so cancels the request on the server.
    reason = None
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that can't show a character is no reason to end
    with contextlib.closing(deltas):
        for delta in deltas:
            if answer is not None and delta.text:
                answer.append(delta.text)  # first: Ctrl-C may come while it is printed
            click.echo(delta.text, nl=False)
            reason = delta.finish_reason
    click.echo()
    if reason is None:
        raise RequestFailedError("the answer broke off; see the server's log")
    if reason not in _USUAL_ENDS:
        raise RequestFailedError(f"the server ended the answer early: {reason}")


def _sampling(options: dict[str, Any]) -> Sampling:
    unset = (None, ())
    return {name: list(value) if name == "stop" else value for name, value in options.items() if value not in unset}


def _argument_or_stdin(argument: str | None) -> str | None:
    """The argument, else all of standard input; None if that is a terminal."""
    if argument is not None:
        return argument
    if sys.stdin.isatty():
        return None
    return sys.stdin.buffer.read().decode("utf-8", errors="replace").rstrip("\n")


def _client(url: str, key: str | None) -> Client:
    try:
        return Client(url, key)
    except LaunchError as error:
        raise click.ClickException(str(error)) from None


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except RequestFailedError as error:
        raise click.ClickException(str(error)) from None
