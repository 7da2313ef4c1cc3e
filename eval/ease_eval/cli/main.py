"""ease-eval: measure a bundle."""

import click

from ease_common.commands import CommandGroup
from ease_eval.cli import measure, quality, speed


@click.group(cls=CommandGroup)
@click.version_option(package_name="ease-lm")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Measure what early exits cost in perplexity and save in time."""


for command in (
    measure.table,
    measure.ppl,
    measure.latency,
    measure.depth,
    measure.report,
    quality.calibrate,
    quality.agreement,
    quality.tasks,
    quality.lm_eval,
    speed.compare,
    speed.advise,
):
    main.add_command(command)

if __name__ == "__main__":
    main()
