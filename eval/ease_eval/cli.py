"""ease-eval: measure a bundle."""

import click

from ease_eval import cli_measure, cli_quality, cli_speed
from ease_runtime.commands import ErrorGroup
from ease_runtime.errors import EaseError
from ease_train.errors import TrainError


class EvalGroup(ErrorGroup):
    errors = (EaseError, TrainError)


@click.group(cls=EvalGroup)
@click.version_option(package_name="ease-lm")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Measure what early exits cost in perplexity and save in time."""


for command in (
    cli_measure.table,
    cli_measure.ppl,
    cli_measure.latency,
    cli_measure.depth,
    cli_measure.report,
    cli_quality.calibrate,
    cli_quality.agreement,
    cli_quality.tasks,
    cli_quality.lm_eval,
    cli_speed.compare,
    cli_speed.advise,
):
    main.add_command(command)

if __name__ == "__main__":
    main()
