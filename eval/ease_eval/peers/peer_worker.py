"""One runtime in a process of its own, which serves requests for ease_eval.peers.compare.

Needs nothing of EASE but where it runs EASE.

    python peer_worker.py '{"runtime": "transformers eager", "checkpoint": "DIR", "threads": 0}'

It says {"ready": true, "version": ..., "load": seconds} once the model is loaded, or {"error": ...}. Then
each line {"prompt": ids, "new": N, "rows": R} is answered with the seconds until each of R rows has its first
token, the seconds after that, the tokens that came in them, the first row's ids and the resident memory in
bytes. R rows have the same prompt. Generation is greedy and goes on past end tokens. A line {"score": ids} is
answered with the negative log-likelihood of all ids but the first. {"absent": true} is what a runtime says
that has no such thing.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # of onnxruntime, which onnxruntime-genai brings along


class Told:
    """The tokens of one answer, by row, and when they came.

    `put` and `end` are what `generate` of transformers calls, first with the prompt.
    """

    def __init__(self, num_rows: int = 1) -> None:
        self.began = time.perf_counter()
        self.clock: list[list[float]] = [[] for _ in range(num_rows)]
        self.ids: list[list[int]] = [[] for _ in range(num_rows)]
        self.begun = False

    def note(self, token: int, row: int = 0) -> None:
        """Take a token as it comes."""
        self.clock[row].append(time.perf_counter())
        self.ids[row].append(token)

    def put(self, tokens: Any) -> None:
        """Take a tensor of tokens."""
        if self.begun:
            for token in tokens.flatten().tolist():
                self.note(token)
        self.begun = True

    def end(self) -> None:
        """Nothing is left to do."""

    def answer(self) -> dict[str, Any]:
        """When the tokens came. Rows that are ahead of the others have tokens before each has its first."""
        all_begun = max(clock[0] for clock in self.clock)
        late = [second for clock in self.clock for second in clock if second > all_begun]
        return {
            "first": all_begun - self.began,
            "rest": max(late) - all_begun,
            "tokens": len(late),
            "ids": self.ids[0],
            "resident": resident_bytes(),
        }


class Runtime(NamedTuple):
    """A loaded model."""

    package: str
    run: Callable[[list[int], int, Told], None]  # prompt, number of tokens; rows are those of Told
    score: Callable[[list[int]], float] | None = None  # negative log-likelihood in nats
    most_rows: int = 1


def main(asked: dict[str, Any]) -> None:
    try:
        if asked["runtime"] == "onnxruntime-genai":
            build_genai(Path(asked["built"]), asked)
        began = time.perf_counter()
        runtime = RUNTIMES[asked["runtime"]](asked)
    except Exception as error:  # whatever a foreign runtime raises, it is one line for whoever asked
        say({"error": one_line(error)})
        return
    load = time.perf_counter() - began
    say({"ready": True, "version": f"{runtime.package} {version_of(runtime.package)}", "load": load})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = scored(runtime, request) if "score" in request else answered(runtime, request)
        except Exception as error:
            reply = {"error": one_line(error)}
        say(reply)
        if "error" in reply:
            return


def answered(runtime: Runtime, request: dict[str, Any]) -> dict[str, Any]:
    """What a request for tokens is answered with; nothing but `absent` where rows are too many."""
    num_rows = request.get("rows", 1)
    if num_rows > runtime.most_rows:
        return {"absent": True}
    told = Told(num_rows)
    runtime.run(request["prompt"], request["new"], told)
    least = min(len(ids) for ids in told.ids)
    if least < request["new"]:
        return {"error": f"only {least} of {request['new']} tokens came"}
    return told.answer()


def scored(runtime: Runtime, request: dict[str, Any]) -> dict[str, Any]:
    """What a request for a text's likelihood is answered with."""
    return {"absent": True} if runtime.score is None else {"nll": runtime.score(request["score"])}


def say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def version_of(package: str) -> str:
    """A package's version; one that was built in place may have none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"


def one_line(error: Exception) -> str:
    """An error's kind and message, not more than a line."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed; run: make peers"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def resident_bytes() -> int | None:
    """The process's memory; None where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def num_threads(asked: dict[str, Any]) -> int:
    """As many as asked for, else one a CPU."""
    return asked["threads"] or os.cpu_count() or 1


def nll(logits: Any, ids: list[int]) -> float:
    """Negative log-likelihood in nats of ids but the first, by logits (T, V) of all but the last (numpy)."""
    import numpy as np

    rows = np.asarray(logits, np.float64)[: len(ids) - 1]
    top = rows.max(-1)
    log_sums = np.log(np.exp(rows - top[:, None]).sum(-1)) + top
    return float((log_sums - rows[np.arange(len(rows)), ids[1:]]).sum())


def ease(asked: dict[str, Any]) -> Runtime:
    """A bundle under a policy, or with drafts from its own text."""
    from ease_runtime.drafters import NgramLookup
    from ease_runtime.engine.engine import Engine
    from ease_runtime.options import Options
    from ease_runtime.ort.stack import open_stack

    most_rows = asked["rows"]
    stack = open_stack(Path(asked["bundle"]), device=asked["device"], num_threads=asked["threads"])
    engine = Engine(stack, num_slots=most_rows)
    options = Options(**asked["settings"])
    policy = options.exit_policy(engine.stack.exit_layers)
    drafters = [NgramLookup()] if options.drafts_from_text else []
    catch_up = "verify" if drafters else options.catch_up
    if catch_up == "verify":
        engine.measure()

    def run(prompt: list[int], new: int, told: Told) -> None:
        rows = [
            engine.start(prompt, max_new_tokens=new, policy=policy, catch_up=catch_up, drafters=drafters)
            for _ in told.ids
        ]
        while engine.busy:
            engine.step()
            for row, sequence in enumerate(rows):
                for token in sequence.produced[len(told.ids[row]) :]:
                    told.note(token.id, row)

    def score(ids: list[int]) -> float:
        sequence = engine.start(ids, max_new_tokens=0, score_prompt=True)
        while engine.busy:
            engine.step()
        return -sum(token.logprob for token in sequence.prompt_scores)

    return Runtime("ease-lm", run, None if asked["settings"] else score, most_rows)


def transformers_eager(asked: dict[str, Any]) -> Runtime:
    """The model's own loop with its cache, eager attention."""
    import torch

    model = load_transformers(asked)

    @torch.no_grad()
    def run(prompt: list[int], new: int, told: Told) -> None:
        inputs = torch.tensor([prompt] * len(told.ids), device=model.device)
        cache = None
        for _ in range(new):
            output = model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            inputs = output.logits[:, -1].argmax(-1, keepdim=True)
            for row, token in enumerate(inputs.flatten().tolist()):
                told.note(token, row)

    @torch.no_grad()
    def score(ids: list[int]) -> float:
        return nll(model(torch.tensor([ids], device=model.device)).logits[0].float().cpu().numpy(), ids)

    return Runtime("transformers", run, score, asked["rows"])


def transformers_drafts(asked: dict[str, Any]) -> Runtime:
    """Drafts, judged at full depth, of what `how` says to `generate`: an early exit (LayerSkip), or lookup in
    the prompt.
    """
    import torch

    model = load_transformers(asked)
    model.generation_config.eos_token_id = None

    @torch.no_grad()
    def run(prompt: list[int], new: int, told: Told) -> None:
        ids = torch.tensor([prompt], device=model.device)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            streamer=told,
            **asked["how"],
        )

    return Runtime("transformers", run)


def load_transformers(asked: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(num_threads(asked))
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[asked["floats"]]
    model: Any = AutoModelForCausalLM.from_pretrained(
        asked["checkpoint"], dtype=dtype, attn_implementation="eager"
    )
    return model.eval().to(asked["device"])


def onnxruntime_genai(asked: dict[str, Any]) -> Runtime:
    """The model that its own builder has made of the checkpoint."""
    import onnxruntime_genai as og

    folder = Path(asked["built"])
    model = og.Model(str(folder))

    def run(prompt: list[int], new: int, told: Told) -> None:
        parameters = og.GeneratorParams(model)
        length = len(prompt) + new
        num_rows = len(told.ids)
        parameters.set_search_options(
            max_length=length, min_length=length, do_sample=False, batch_size=num_rows
        )
        generator = og.Generator(model, parameters)
        generator.append_tokens(prompt if num_rows == 1 else [prompt] * num_rows)
        for _ in range(new):
            generator.generate_next_token()
            for row, token in enumerate(generator.get_next_tokens()):
                told.note(int(token), row)

    def score(ids: list[int]) -> float:
        return nll(genai_logits(folder, ids), ids)

    return Runtime("onnxruntime-genai", run, score if asked["device"] == "cpu" else None, asked["rows"])


def genai_logits(folder: Path, ids: list[int]) -> Any:
    """Logits (T, V) of its model's graph in onnxruntime, since a Generator gives those of the last id alone.

    The session lives as long as the call: it would be in the way of what is timed.
    """
    import numpy as np
    import onnxruntime as ort

    config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    width = config["model"]["decoder"]["head_size"]
    session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    feeds = {"input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, len(ids)), np.int64)}
    for wanted in session.get_inputs():
        if wanted.name.startswith("past_key_values"):
            feeds[wanted.name] = np.zeros((1, wanted.shape[1], 0, width), np.float32)
    return session.run(["logits"], feeds)[0][0]


def build_genai(folder: Path, asked: dict[str, Any]) -> None:
    """Make the builder's model once, whole or not at all."""
    import subprocess

    import onnxruntime_genai  # noqa: F401  # so that its absence is said as that of any other

    if folder.is_dir():
        return
    partial = folder.with_name(folder.name + ".partial")
    cache = folder.with_name("cache")
    command = [
        sys.executable,
        "-m",
        "onnxruntime_genai.models.builder",
        "-i",
        asked["checkpoint"],
        "-o",
        str(partial),
        "-p",
        asked["precision"],
        "-e",
        asked["device"],
        "-c",
        str(cache),
    ]
    if asked["options"]:
        command += ["--extra_options", *asked["options"]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"its model builder failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
        )
    if asked["threads"]:
        config = partial / "genai_config.json"
        values = json.loads(config.read_text(encoding="utf-8"))
        values["model"]["decoder"]["session_options"]["intra_op_num_threads"] = asked["threads"]
        config.write_text(json.dumps(values, indent=2), encoding="utf-8")
    os.replace(partial, folder)


def llama_cpp(asked: dict[str, Any]) -> Runtime:
    """A GGUF file in llama.cpp, as its own server runs it (in this process); times are those it
    takes itself.
    """
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = asked["gguf"]
    parameters.n_ctx = asked["context"]
    parameters.n_parallel = 1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = num_threads(asked)
    if asked.get("lookup"):
        kinds = xllamacpp.common_speculative_type
        parameters.speculative.types = [kinds.COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE]
        match, drafts = asked["lookup"]
        parameters.speculative.ngram_simple.size_n = match
        parameters.speculative.ngram_simple.size_m = drafts
    server = xllamacpp.Server(parameters)
    greedy = {"temperature": 0.0, "ignore_eos": True, "verbose": True, "return_tokens": True}

    def complete(**request: Any) -> Any:
        answer = server.handle_completions({**greedy, **request})
        if "timings" not in answer:
            raise RuntimeError(str(answer))
        return answer

    def run(prompt: list[int], new: int, told: Told) -> None:
        answer = complete(prompt=prompt, n_predict=new, cache_prompt=False)
        ids = answer["__verbose"]["tokens"]
        first = answer["timings"]["prompt_ms"] / 1e3  # its answer begins with the prompt's last token
        rest = answer["timings"]["predicted_ms"] / 1e3
        told.began = 0.0
        told.ids = [ids]
        told.clock = [[first + rest * place / max(1, len(ids) - 1) for place in range(len(ids))]]

    def score(ids: list[int]) -> float:
        found = 0.0
        for place in range(1, len(ids)):
            for num_shown in (100, asked["vocab_size"]):  # mostly it is among the first
                told = complete(prompt=ids[:place], n_predict=1, cache_prompt=True, n_probs=num_shown)
                shown = told["__verbose"]["completion_probabilities"][0]["top_logprobs"]
                logprob = next((one["logprob"] for one in shown if one["id"] == ids[place]), None)
                if logprob is not None:
                    found -= logprob
                    break
            else:
                raise RuntimeError(f"no probability of token {ids[place]} came")
        return found

    return Runtime("xllamacpp", run, score)


RUNTIMES: dict[str, Callable[[dict[str, Any]], Runtime]] = {
    "ease": ease,
    "transformers eager": transformers_eager,
    "transformers drafts": transformers_drafts,
    "onnxruntime-genai": onnxruntime_genai,
    "llama.cpp": llama_cpp,
}

if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
