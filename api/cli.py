"""The command line: `llmopt generate`, `bench`, `explain`, `bisect`, `repro`, `export`, `cache`, `env`.

Results go to stdout, progress and errors to stderr. Exit status: 0 done, 1 the file system refused, 2 a mistake in
what was asked (every `LlmoptError`), 130 interrupted. Whatever is slow to import is imported inside the command that
needs it.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

import llmopt
from llmopt.commands import bench as benching
from llmopt.commands import bisect as bisecting
from llmopt.commands import cache as caching
from llmopt.commands import env as environment
from llmopt.commands import explain as explaining
from llmopt.commands import export as exporting
from llmopt.commands import generate as generating
from llmopt.commands import repro as reproducing
from llmopt.commands.common import complain
from llmopt.compiler.errors import LlmoptError


class _Commands(typer.core.TyperGroup):
    """Turns llmopt's own errors into one line; what is a bug keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LlmoptError as error:
            complain(str(error))
            raise typer.Exit(2) from None
        except BrokenPipeError:
            raise  # typer ends quietly when the reader of a pipe has gone
        except OSError as error:
            complain(str(error))
            raise typer.Exit(1) from None


app = typer.Typer(
    name="llmopt",
    cls=_Commands,
    help="Makes language-model inference fast. MODEL is a Hugging Face folder or a file that `llmopt export` wrote.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"llmopt {llmopt.__version__}")
        raise typer.Exit()


@app.callback()
def _global(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    # A progress bar belongs on a terminal; transformers and its hub client read this when they are imported.
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


app.command(epilog=generating.EPILOG)(generating.generate)
app.add_typer(benching.app, name="bench")
app.command(epilog=explaining.EPILOG)(explaining.explain)
app.command(epilog=bisecting.EPILOG, context_settings=bisecting.CONTEXT)(bisecting.bisect)
app.command(epilog=reproducing.EPILOG, context_settings=reproducing.CONTEXT)(reproducing.repro)
app.command(epilog=exporting.EPILOG)(exporting.export)
app.add_typer(caching.app, name="cache")
app.command(epilog=environment.EPILOG)(environment.env)


def main() -> None:
    """The entry point `llmopt`."""
    # Generated text may hold what an old terminal's encoding cannot show; that must not end the program.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    app()


if __name__ == "__main__":
    main()
