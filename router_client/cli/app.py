"""The commands put together, and the entry point."""

import io
import sys
from collections.abc import Sequence

import typer

from router_client.cli import jobs, overview
from router_client.cli.predict import predict
from router_client.cli.submit import submit

NAME = "inference-router"
EXIT_CODES = "Exit codes: 0 done, 1 failed, 2 usage, 3 some agents failed, 130 interrupted."

app = typer.Typer(
    help="Ask an inference router, and the jobs of its gateway.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(predict)
app.command()(submit)
app.add_typer(jobs.app, name="jobs")
app.command()(overview.models)
app.command()(overview.status)
app.command()(overview.health)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, ``sys.argv`` by default, and return its exit code.

    What the encoding of stdout lacks is escaped, as Python itself does on stderr.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app(None if arguments is None else list(arguments), prog_name=NAME)
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else 0
    return 0
