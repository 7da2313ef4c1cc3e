"""The same weights and prompts in other runtimes, each a process of its own, taking turns within one run.

    python = Path(".venv-peers/bin/python")
    comparison = compare_peers(ComparisonSettings(bundle, checkpoint, python=python), [Workload(prompts)])
    print(comparison.markdown())

Every runtime answers every prompt once a round, in an order that rotates; the first round warms up and is not
counted. One that is not there, does not start, crashes or hangs is named with its reason, and the others go
on. Workloads come one after the other, with the same processes.
"""

import json
import math
import os
import queue
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from ease_common.errors import RequestError
from ease_eval.peers import peer_worker
from ease_runtime.bundle.manifest import load_manifest, read_manifest
from ease_runtime.policies.thresholds import Thresholds

START_SECONDS = 1800.0  # onnxruntime-genai first builds its model
# that its builder makes for a device
GENAI_PRECISIONS = {"cpu": ("int4", "int8"), "cuda": ("int4", "fp32", "bf16")}
FLOATS = {
    "cpu": "fp32",
    "cuda": "fp16",
}  # what peers compute in there, where a bundle's precision is not theirs
# its builder's options; 0.18 writes a graph that does not load where embedding and 8-bit head are one
GENAI_8_BIT_HEAD = ("matmul_mixed_precision=last_matmul:int8", "shared_embeddings=false")
GENAI_GRAPHS = ("enable_cuda_graph=true",)
RUNTIMES = ("transformers", "early-exit", "genai", "llama.cpp")  # beside EASE
LOOKUP = "lookup"  # asked on top of these: drafts from text, EASE's too
PROMPT_LOOKUP = 10  # tokens that transformers drafts, as the method's author does
LLAMA_LOOKUPS = (
    (12, 48),
    (3, 8),
)  # tokens that match and that are drafted: llama.cpp's defaults, and shorter


@dataclass(frozen=True)
class ComparisonSettings:
    """What is compared. Raises RequestError for a checkpoint that is none of the bundle's model.

    `python` is that of the peers' environment; `settings` (options like threshold and catch_up) make a row of
    early exits. `runtimes` are those of RUNTIMES that are asked, and LOOKUP for rows with drafts from text.
    """

    bundle: Path
    checkpoint: Path
    python: Path
    others: tuple[Path, ...] = ()  # bundles of the same model in other forms, at full depth
    ggufs: tuple[Path, ...] = ()
    runtimes: tuple[str, ...] = RUNTIMES
    settings: dict[str, Any] | None = None
    exit_layer: int | None = None  # of transformers' self-speculation; None: the bundle's middle early exit
    new_tokens: int = 64
    rounds: int = 5
    threads: int = 0
    device: str = "cpu"  # of EASE and its peers, but of llama.cpp: cpu, or cuda
    answer_seconds: float = 600.0
    work: Path = Path("runs/peers")  # for models that peers build

    def __post_init__(self) -> None:
        for name, least in (("new_tokens", 2), ("rounds", 1)):
            if getattr(self, name) < least:
                raise RequestError(f"{name} = {getattr(self, name)}, expected at least {least}")
        if self.device not in FLOATS:
            raise RequestError(
                f"device '{self.device}': runtimes are compared on one of: {', '.join(FLOATS)}"
            )
        config = read_config(self.checkpoint)
        size = (config.get("num_hidden_layers"), config.get("vocab_size"))
        for bundle in (*self.others, self.bundle):
            manifest = load_manifest(bundle)
            if (manifest.num_layers, manifest.vocab_size) != size:
                raise RequestError(
                    f"{self.checkpoint} has {size[0]} layers and {size[1]} tokens, "
                    f"{bundle} has {manifest.num_layers} and {manifest.vocab_size}: not the same model"
                )
        for gguf in self.ggufs:
            if not gguf.is_file():
                raise RequestError(f"no GGUF file at {gguf}")
        early = manifest.exit_layers[:-1]
        if self.exit_layer is None and early:
            object.__setattr__(self, "exit_layer", early[len(early) // 2])
        if self.exit_layer is not None and not 0 < self.exit_layer < manifest.num_layers:
            raise RequestError(f"exit layer {self.exit_layer} is outside 1..{manifest.num_layers - 1}")

    def peers(self, most_rows: int = 1, longest: int = 4096) -> list["Peer"]:
        """Every runtime that this plan can ask, EASE at full depth first.

        For batches of at most `most_rows`, and prompts with their answers of at most `longest` tokens.
        """
        manifest = read_manifest(self.bundle)
        python = str(self.python)
        floats = manifest.activations if manifest.activations in ("fp32", "bf16") else FLOATS[self.device]
        common = {
            "checkpoint": str(self.checkpoint.resolve()),
            "threads": self.threads,
            "rows": most_rows,
            "device": self.device,
            "floats": floats,
        }
        peers = [self.ease("ease", self.bundle, {}, most_rows)]
        peers += [self.ease(f"ease {bundle.name}", bundle, {}, most_rows) for bundle in self.others]
        if self.settings:
            peers.append(self.ease(f"ease {describe(self.settings)}", self.bundle, self.settings, most_rows))
        if "transformers" in self.runtimes:
            peers.append(
                Peer("transformers eager", floats, python, {"runtime": "transformers eager", **common})
            )
        if "early-exit" in self.runtimes and self.exit_layer is not None:
            how = {"assistant_early_exit": self.exit_layer}
            asked = {"runtime": "transformers drafts", "how": how, **common}
            peers.append(Peer(f"transformers early exit {self.exit_layer}", floats, python, asked))
        if "genai" in self.runtimes:
            made = GENAI_PRECISIONS[self.device]
            precision = manifest.precision if manifest.precision in made else FLOATS[self.device]
            peers.append(self.genai("onnxruntime-genai", precision, (), common))
            if precision == "int4":
                peers.append(self.genai("onnxruntime-genai, 8-bit head", precision, GENAI_8_BIT_HEAD, common))
            if self.device == "cuda":
                peers.append(self.genai("onnxruntime-genai, CUDA graphs", precision, GENAI_GRAPHS, common))
        if LOOKUP in self.runtimes:
            how = {"prompt_lookup_num_tokens": PROMPT_LOOKUP}
            asked = {"runtime": "transformers drafts", "how": how, **common}
            peers.append(self.ease("ease, drafts from text", self.bundle, {"draft": "auto"}, most_rows))
            peers.append(Peer("transformers, prompt lookup", floats, python, asked))
        for gguf in self.ggufs:
            peers += self.llama_cpp(gguf, longest, manifest.vocab_size)
        return peers

    def llama_cpp(self, gguf: Path, longest: int, vocab_size: int) -> list["Peer"]:
        """llama.cpp with a file, by itself and with drafts from text, whichever are asked."""
        asked = {
            "runtime": "llama.cpp",
            "gguf": str(gguf.resolve()),
            "context": longest,
            "vocab_size": vocab_size,
            "threads": self.threads,
        }
        precision = gguf.stem.rpartition(".")[2]
        peers = []
        if "llama.cpp" in self.runtimes:
            peers.append(Peer("llama.cpp", precision, str(self.python), asked))
        for match, drafts in LLAMA_LOOKUPS if LOOKUP in self.runtimes else ():
            name = f"llama.cpp, n-grams {match}, {drafts}"
            peers.append(Peer(name, precision, str(self.python), {**asked, "lookup": (match, drafts)}))
        return peers

    def ease(self, name: str, bundle: Path, settings: dict[str, Any], most_rows: int) -> "Peer":
        """EASE with a bundle."""
        asked = {
            "runtime": "ease",
            "bundle": str(bundle.resolve()),
            "settings": settings,
            "threads": self.threads,
            "rows": most_rows,
            "device": self.device,
        }
        return Peer(name, read_manifest(bundle).precision, sys.executable, asked)

    def genai(self, name: str, precision: str, options: tuple[str, ...], common: dict[str, Any]) -> "Peer":
        """A model of onnxruntime-genai's builder, which has its options in its folder's name."""
        made_of = f"{self.checkpoint.resolve()} {self.threads} {' '.join(options)}".strip()
        where = "" if self.device == "cpu" else f"-{self.device}"
        built = self.work / f"genai-{precision}{where}-{sha256(made_of.encode()).hexdigest()[:8]}"
        asked = {
            "runtime": "onnxruntime-genai",
            "built": str(built.resolve()),
            "precision": precision,
            "options": options,
            **common,
        }
        return Peer(name, precision, str(self.python), asked)


@dataclass(frozen=True)
class Workload:
    """Prompts (ids), each answered by `batch_size` rows at once. Raises RequestError for none."""

    prompts: Sequence[Sequence[int]]
    batch_size: int = 1

    def __post_init__(self) -> None:
        if not self.prompts:
            raise RequestError("no prompts to compare runtimes on; give at least one")
        if self.batch_size < 1:
            raise RequestError(f"a batch of {self.batch_size}, expected at least 1 row")

    @property
    def prompt_tokens(self) -> int:
        """Of the longest prompt."""
        return max(map(len, self.prompts))


def describe(settings: dict[str, Any]) -> str:
    """A row's settings in a few characters."""
    threshold = Thresholds.of(settings.get("threshold"))
    return f"{settings.get('policy', 'max-prob')} {threshold} {settings.get('catch_up', 'recompute')}"


def read_config(checkpoint: Path) -> dict[str, Any]:
    """The config of a Hugging Face directory. Raises RequestError where it is none."""
    file = checkpoint / "config.json"
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise RequestError(f"{checkpoint} is no Hugging Face directory: no readable config.json") from None
    if "model_type" not in config:
        raise RequestError(
            f"{checkpoint} is no Hugging Face directory; make one of a checkpoint: ease-train export-hf "
            f"{checkpoint} DIR"
        )
    return config


@dataclass(frozen=True)
class Peer:
    """A runtime, and how its process is started."""

    name: str
    precision: str
    python: str
    asked: dict[str, Any]


@dataclass(frozen=True)
class PeerRow:
    """One runtime in one workload: medians over the counted answers, or an `error` and no figures."""

    runtime: str
    precision: str
    version: str | None = None
    error: str | None = None
    prompt_tokens: int | None = None  # of the longest prompt
    batch_size: int = 1
    tokens_per_second: float | None = None  # of all rows, after each has its first token
    tokens_per_second_range: tuple[float, float] | None = None  # over rounds
    first_token_ms: float | None = None
    load_seconds: float | None = None
    resident_mb: float | None = None
    perplexity: float | None = None  # of the scored text
    # EASE's speed at full depth over this one's, median of the ratios prompt by prompt
    ease_over_this: float | None = None
    first_token_over_this: float | None = None  # EASE's time to the first token over this one's, likewise
    same_texts: float | None = None  # share of the prompts with EASE's full-depth text, up to where that ends
    mean_agreement: float | None = None  # share of each text before the first difference


COLUMNS = (
    "runtime",
    "precision",
    "prompt",
    "batch",
    "tokens/s",
    "ease is",
    "first token ms",
    "load s",
    "resident MB",
    "perplexity",
    "same texts",
    "agreement",
)


@dataclass(frozen=True)
class Comparison:
    """All rows, and what they were measured on."""

    num_prompts: int  # of each workload
    new_tokens: int
    rounds: int
    scored_tokens: int
    rows: tuple[PeerRow, ...]

    def to_json(self, source: dict[str, Any]) -> str:
        """As JSON text, with where it comes from."""
        return json.dumps({**source, **asdict(self)}, indent=2) + "\n"

    def markdown(self) -> str:
        """As a Markdown table; runtimes without figures stand below it."""
        lines = ["| " + " | ".join(COLUMNS) + " |", "|---|---|" + "---:|" * (len(COLUMNS) - 2)]
        lines += ["| " + " | ".join(cells(row)) + " |" for row in self.rows if row.error is None]
        return (
            "\n".join([*lines, *(f"\n{row.runtime}: {row.error}" for row in self.rows if row.error)]) + "\n"
        )


def cells(row: PeerRow) -> list[str]:
    """A row as the texts of COLUMNS."""
    figures = (
        row.prompt_tokens,
        row.batch_size,
        row.tokens_per_second,
        row.ease_over_this,
        row.first_token_ms,
        row.load_seconds,
        row.resident_mb,
        row.perplexity,
        row.same_texts,
        row.mean_agreement,
    )
    forms = ("{}", "{}", "{:.1f}", "{:.2f}x", "{:.0f}", "{:.2f}", "{:.0f}", "{:.2f}", "{:.0%}", "{:.0%}")
    shown = ["–" if value is None else form.format(value) for form, value in zip(forms, figures, strict=True)]
    return [row.runtime, row.precision, *shown]


class PeerProcess:
    """A peer's process. `error` says why there is none, or no longer."""

    def __init__(self, peer: Peer, answer_seconds: float) -> None:
        self.peer = peer
        self.answer_seconds = answer_seconds
        self.version: str | None = None
        self.load_seconds: float | None = None
        self.perplexity: float | None = None
        self.rounds: list[list[dict[str, Any]]] = []
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.error: str | None = None
        if not Path(peer.python).is_file():
            self.error = f"no Python at {peer.python}; run: make peers"
            return
        command = [peer.python, peer_worker.__file__, json.dumps(peer.asked)]
        environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None, "it is a pipe"
        for line in self.process.stdout:
            if line.startswith("{"):  # a foreign runtime may print what it likes
                self.lines.put(line)
        self.lines.put(None)

    def start(self) -> None:
        """Wait until the model is loaded."""
        if self.error is None:
            ready = self._read(START_SECONDS)
            self.version = ready.get("version")
            self.load_seconds = ready.get("load")

    def ask(self, prompt: Sequence[int], new: int, batch_size: int = 1) -> dict[str, Any] | None:
        """A prompt's answer; None where it runs no such batch, or once the process is of no use."""
        return self._request({"prompt": list(prompt), "new": new, "rows": batch_size})

    def score(self, texts: Sequence[Sequence[int]]) -> None:
        """Find the perplexity of texts, each by itself."""
        total = 0.0
        for ids in texts:
            answer = self._request({"score": list(ids)})
            if answer is None:
                return
            total += answer["nll"]
        self.perplexity = math.exp(total / sum(len(ids) - 1 for ids in texts))

    def _request(self, request: dict[str, Any]) -> dict[str, Any] | None:
        if self.error is not None:
            return None
        assert self.process.stdin is not None, "it is a pipe"
        with suppress(OSError):  # if it has ended, reading tells how
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        answer = self._read(self.answer_seconds)
        return answer if self.error is None and "absent" not in answer else None

    def _read(self, seconds: float) -> dict[str, Any]:
        try:
            line = self.lines.get(timeout=seconds)
        except queue.Empty:
            self.error = f"no answer in {seconds:g} seconds"
            self.stop()
            return {}
        if line is None:
            self.error = f"its process ended: {ending(self.process.wait())}"
            return {}
        answer: dict[str, Any] = json.loads(line)
        self.error = answer.get("error")
        return answer

    def stop(self) -> None:
        """End the process."""
        if hasattr(self, "process"):
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                assert pipe is not None, "both are pipes"
                with suppress(OSError):  # what stood in it went with the process
                    pipe.close()


def ending(code: int) -> str:
    """How a process ended, in words."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def compare_peers(
    plan: ComparisonSettings,
    workloads: Sequence[Workload],
    scored: Sequence[Sequence[int]] = (),
    tell: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Ask every runtime for every prompt, in turns; `tell` takes a line on how far it is.

    `scored` are texts (ids) whose perplexity stands beside the speed, first of all. Raises RequestError
    without a workload, or when EASE itself cannot run.
    """
    if not workloads:
        raise RequestError("no prompts to compare runtimes on; give at least one")
    plan.work.mkdir(parents=True, exist_ok=True)
    most_rows = max(workload.batch_size for workload in workloads)
    longest = max(workload.prompt_tokens for workload in workloads) + plan.new_tokens
    stops = frozenset(read_manifest(plan.bundle).stop_ids)
    workers = []
    rows: list[PeerRow] = []
    try:
        for peer in plan.peers(most_rows, max(longest, *(len(ids) for ids in scored), 0)):
            workers.append(
                PeerProcess(peer, plan.answer_seconds)
            )  # one after the other: loading takes memory
            workers[-1].start()
            if scored:
                workers[-1].score(scored)
            tell(f"{peer.name}: {workers[-1].error or 'ready'}")
        if workers[0].error is not None:
            raise RequestError(f"ease itself does not run: {workers[0].error}")
        for workload in workloads:
            for number in range(plan.rounds + 1):
                take_turns(workers, workload, plan.new_tokens, number)
                tell(
                    f"prompts of {workload.prompt_tokens}, batch {workload.batch_size}: "
                    + (f"round {number} of {plan.rounds}" if number else "warm")
                )
            rows += [
                make_row(worker, workers[0], stops, workload)
                for worker in workers
                if worker.error or any(worker.rounds)
            ]
    finally:
        for worker in workers:
            worker.stop()
    scored_tokens = sum(len(ids) - 1 for ids in scored)
    return Comparison(len(workloads[0].prompts), plan.new_tokens, plan.rounds, scored_tokens, tuple(rows))


def take_turns(workers: Sequence[PeerProcess], workload: Workload, new: int, number: int) -> None:
    """One round: every prompt to every runtime that still answers, each time another first.

    Round 0 warms up.
    """
    for worker in workers:
        worker.rounds = [*worker.rounds, []] if number else []
    for place, prompt in enumerate(workload.prompts):
        for i in range(len(workers)):
            worker = workers[(i + place + number) % len(workers)]
            answer = worker.ask(prompt, new, workload.batch_size)
            if answer is not None and number:
                worker.rounds[-1].append(answer)


def make_row(worker: PeerProcess, ease: PeerProcess, stops: frozenset[int], workload: Workload) -> PeerRow:
    """A runtime's figures against EASE's at full depth."""
    row = PeerRow(
        worker.peer.name,
        worker.peer.precision,
        worker.version,
        worker.error or ease.error,
        workload.prompt_tokens,
        workload.batch_size,
        load_seconds=worker.load_seconds,
        perplexity=worker.perplexity,
    )
    if row.error is not None:
        return row
    answers = [a for part in worker.rounds for a in part]
    ours = [a for part in ease.rounds for a in part]
    speeds = [sum(a["tokens"] for a in part) / sum(a["rest"] for a in part) for part in worker.rounds]
    shared = [agreement(a["ids"], b["ids"], stops) for a, b in zip(answers, ours, strict=True)]
    memory = answers[-1]["resident"]
    pairs = list(zip(answers, ours, strict=True))
    return replace(
        row,
        tokens_per_second=statistics.median(speeds),
        tokens_per_second_range=(min(speeds), max(speeds)),
        first_token_ms=1000 * statistics.median(a["first"] for a in answers),
        resident_mb=None if memory is None else memory / 1e6,
        ease_over_this=statistics.median(speed_of(b) / speed_of(a) for a, b in pairs),
        first_token_over_this=statistics.median(b["first"] / a["first"] for a, b in pairs),
        same_texts=sum(share == 1.0 for share in shared) / len(shared),
        mean_agreement=statistics.mean(shared),
    )


def speed_of(answer: dict[str, Any]) -> float:
    """Tokens a second of an answer."""
    speed: float = answer["tokens"] / answer["rest"]
    return speed


def agreement(ids: Sequence[int], ours: Sequence[int], stops: frozenset[int]) -> float:
    """The share of our text before the first difference; what follows our first stop token does not count."""
    end = next((place + 1 for place, token in enumerate(ours) if token in stops), len(ours))
    same = next(
        (place for place, (a, b) in enumerate(zip(ids, ours[:end], strict=False)) if a != b),
        min(len(ids), end),
    )
    return same / end
