"""The command `liaoyuan` (short: `ly`): one verb per job.

A verb's file imports its room inside the function, so that help and mistakes in the command line are instant.
"""

import sys

import typer

from liaoyuan.cli.chat import chat
from liaoyuan.cli.console import console
from liaoyuan.cli.convert import convert
from liaoyuan.cli.data import app as data
from liaoyuan.cli.doctor import doctor
from liaoyuan.cli.eval import evaluate
from liaoyuan.cli.groups import GroupedCommand
from liaoyuan.cli.launch import launch
from liaoyuan.cli.ops import app as ops
from liaoyuan.cli.plan import app as plan
from liaoyuan.cli.process import ending_at_once, tune_process
from liaoyuan.cli.quickstart import quickstart
from liaoyuan.cli.report import report
from liaoyuan.cli.rewards import app as rewards
from liaoyuan.cli.score import score
from liaoyuan.cli.serve import serve
from liaoyuan.cli.tasks import app as tasks
from liaoyuan.cli.train import train
from liaoyuan.cli.tune import app as tune
from liaoyuan.errors import LiaoyuanError

app = typer.Typer(
    name="liaoyuan",
    help="From raw text to a reasoning assistant that you trained, own and serve yourself.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(quickstart)
app.add_typer(data, name="data")
app.command()(train)
app.add_typer(tasks, name="tasks")
app.add_typer(tune, name="tune")
app.command("eval")(evaluate)
app.add_typer(rewards, name="rewards")
app.command()(score)
app.command(cls=GroupedCommand)(serve)
app.command()(chat)
app.command()(convert)
app.add_typer(plan, name="plan")
app.command(context_settings={"allow_interspersed_args": False})(launch)
app.add_typer(ops, name="ops")
app.command()(report)
app.command()(console)
app.command()(doctor)

INTERRUPTED = 130  # exit code of a process that Ctrl-C ended


def main() -> None:
    """Run the command line, and end the process."""
    ending_at_once(run)


def run() -> None:
    """Run the command line; a mistake that the user can mend is one sentence on standard error."""
    settings = tune_process()
    try:
        app(obj=settings)
    except LiaoyuanError as error:
        print(f"liaoyuan: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("\nliaoyuan: stopped. Run the same command again to go on from here.", file=sys.stderr)
        sys.exit(INTERRUPTED)
