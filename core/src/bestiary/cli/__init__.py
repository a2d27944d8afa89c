"""The command line: one verb, one file, imported when it is used. This file knows their names, and how they fail."""

import os
import sys
import traceback
from collections.abc import Sequence
from io import TextIOWrapper

from cyclopts import App, CycloptsError

from bestiary import __version__
from bestiary.cli.terminal import UsageError, prose
from bestiary.errors import BestiaryError

__all__ = ["build_app", "main"]

_VERBS = {
    "list": "What is installed: architectures, the plugins that serve them, and what they can do.",
    "info": "What a model is, which plugin serves it, and how much of it fits into this machine's memory.",
    "plan": "What a model takes of devices, split how, and how fast they could serve it at most.",
    "run": "Answer one prompt.",
    "chat": "Talk with a model at the terminal.",
    "bench": "Measure a model's speed, and how much of this machine's it uses.",
    "verify": "Prove that installed plugins do what they declare.",
    "doctor": "Check the installation, and say how to mend what is broken.",
}
_MODELS = """Bestiary serves open models; every architecture is a plugin.

MODEL is a folder, a Hugging Face id (owner/name), modelscope:owner/name, or the word demo."""

_FAILED, _MISUSED, _INTERRUPTED, _PIPE_CLOSED = 1, 2, 130, 141


def build_app() -> App:
    """The verbs, none of them imported yet."""
    app = App(
        name="bestiary",
        help=_MODELS,
        version=f"bestiary {__version__}",
        suppress_keyboard_interrupt=False,
        result_action="return_value",
        print_error=False,
        exit_on_error=False,
    )
    for verb, about in _VERBS.items():
        app.command(f"bestiary.cli.{verb}:command", name=verb, help=about)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the status that the process ends with: 0, 1 for an error, 2 for wrong usage.

    `arguments` are those after the program's name; None takes the process's own. An error of ours is one message;
    BESTIARY_DEBUG=1 shows where it came from.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what the locale cannot spell
    try:
        # Not list(arguments): once the verb is imported, that name is its module here.
        status = build_app()(sys.argv[1:] if arguments is None else [*arguments])
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except (CycloptsError, UsageError) as error:
        return _fail(f"{error}\n`bestiary --help` and `bestiary VERB --help` show what there is.", _MISUSED)
    except BestiaryError as error:
        return _fail(str(error), _FAILED)
    except (ValueError, RuntimeError) as error:
        if not str(error).startswith("BESTIARY_"):
            raise
        return _fail(str(error), _FAILED)  # a variable of the kernels', which know none of our errors
    except KeyboardInterrupt:
        return _INTERRUPTED
    except OSError as error:  # a pipe that is closed, a disk that is full, a file that cannot be written
        # What is still buffered would fail once more when the interpreter flushes it at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED if isinstance(error, BrokenPipeError) else _fail(str(error), _FAILED)


def _fail(message: str, status: int) -> int:
    if os.environ.get("BESTIARY_DEBUG") == "1":
        print(prose(traceback.format_exc()), file=sys.stderr)
    print(f"bestiary: {prose(message)}", file=sys.stderr)
    return status
