"""A batch spread over a Ray cluster: Ray Data hands groups of lines to actors, each with a copy of the model.

The bundle's path must be there on every machine. Needs the extra: pip install 'ease-lm[ray]'.
"""

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ease_common.errors import RequestError
from ease_runtime.cli.batch import answer_lines
from ease_runtime.llm import LLM
from ease_runtime.options import Options

GROUP = 4  # of a worker's lines that travel together, in batches

Block = dict[str, list[Any]]


class ModelReplica:
    """A copy of the model on the cluster. Calling it answers a group of numbered lines."""

    def __init__(self, bundle: str, options: Options, batch_size: int, place: dict[str, Any]) -> None:
        self.llm = LLM(bundle, num_slots=batch_size, **place)
        self.options = options
        self.batch_size = batch_size

    def __call__(self, row: Block) -> Block:
        lines = zip(row["numbers"], (line.encode("latin-1") for line in row["lines"]), strict=True)
        return {"answers": list(answer_lines(self.llm, lines, self.options, self.batch_size))}


class Cluster:
    """A running Ray cluster by its address, or 'local' for one on this machine.

    Raises RequestError when there is none.
    """

    def __init__(self, address: str, num_workers: int) -> None:
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise RequestError(
                f"--ray needs Ray Data ({error}); install it: pip install 'ease-lm[ray]'"
            ) from None
        self.ray: Any = ray
        self.num_workers = num_workers
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # Ray raises whatever its parts raise
            raise RequestError(
                f"no Ray cluster at '{address}': {error}; start one with ray start --head, or say --ray local"
            ) from None
        num_cpus = int(self.ray.cluster_resources().get("CPU", 0))
        if num_cpus < num_workers:
            raise RequestError(
                f"--ray-workers {num_workers} need a CPU each, and the cluster at '{address}' has "
                f"{num_cpus}; ask for fewer"
            )

    def answer_lines(
        self,
        bundle: Path,
        lines: Iterator[tuple[int, bytes]],
        options: Options,
        batch_size: int,
        place: dict[str, Any],
    ) -> Iterator[str]:
        """The answers of numbered lines, in their order.

        `place` says where each copy runs: LLM's device and threads.
        """
        data = self.ray.data
        context = data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        groups = list(_groups(lines, GROUP * batch_size))
        arguments = (str(bundle.resolve()), options, batch_size, place)
        answers = data.from_items(groups, override_num_blocks=len(groups)).map(
            ModelReplica, fn_constructor_args=arguments, compute=data.ActorPoolStrategy(size=self.num_workers)
        )
        for row in answers.iter_rows():
            yield from row["answers"]


def _groups(lines: Iterator[tuple[int, bytes]], size: int) -> Iterator[Block]:
    """Lines by `size`, their bytes as latin-1, which any bytes are."""
    while group := list(itertools.islice(lines, size)):
        yield {
            "numbers": [number for number, _ in group],
            "lines": [line.decode("latin-1") for _, line in group],
        }
