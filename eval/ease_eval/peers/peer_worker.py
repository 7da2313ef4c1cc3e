"""One runtime in a process of its own, which serves requests for ease_eval.peers.compare.

Needs nothing of EASE but where it runs EASE.

    python peer_worker.py '{"runtime": "transformers eager", "checkpoint": "DIR", "threads": 0}'

It says {"ready": true, "version": ...} once the model is loaded, or {"error": ...}. Then each line {"prompt":
ids, "new": N} is answered with the seconds to the first token, those of the others, all ids and the resident
memory in bytes. Generation is greedy and goes on past end tokens.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # of onnxruntime, which onnxruntime-genai brings along


class Told:
    """The tokens of one answer, and when they came.

    `put` and `end` are what `generate` of transformers calls, first with the prompt.
    """

    def __init__(self) -> None:
        self.clock = [time.perf_counter()]
        self.ids = list[int]()
        self.begun = False

    def note(self, token: int) -> None:
        """Take a token as it comes."""
        self.clock.append(time.perf_counter())
        self.ids.append(token)

    def put(self, tokens: Any) -> None:
        """Take a tensor of tokens."""
        if self.begun:
            for token in tokens.flatten().tolist():
                self.note(token)
        self.begun = True

    def end(self) -> None:
        """Nothing is left to do."""


Run = Callable[[list[int], int, Told], None]  # prompt, number of tokens


def main(asked: dict[str, Any]) -> None:
    try:
        name, run = RUNTIMES[asked["runtime"]](asked)
    except Exception as error:  # whatever a foreign runtime raises, it is one line for whoever asked
        say({"error": one_line(error)})
        return
    say({"ready": True, "version": f"{name} {version_of(name)}"})
    for line in sys.stdin:
        request = json.loads(line)
        told = Told()
        try:
            run(request["prompt"], request["new"], told)
        except Exception as error:
            say({"error": one_line(error)})
            return
        clock = told.clock
        ids = told.ids
        if len(ids) < request["new"]:
            say({"error": f"only {len(ids)} of {request['new']} tokens came"})
            return
        say(
            {
                "first": clock[1] - clock[0],
                "rest": clock[-1] - clock[1],
                "ids": ids,
                "resident": resident_bytes(),
            }
        )


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


def ease(asked: dict[str, Any]) -> tuple[str, Run]:
    """A bundle under a policy."""
    from ease_runtime.engine.engine import Engine
    from ease_runtime.options import Options
    from ease_runtime.ort.stack import OrtStack

    engine = Engine(OrtStack(Path(asked["bundle"]), num_threads=asked["threads"]))
    options = Options(**asked["settings"])
    policy = options.exit_policy(engine.stack.exit_layers)
    if options.catch_up == "verify":
        engine.measure()

    def run(prompt: list[int], new: int, told: Told) -> None:
        for token in engine.generate(
            engine.start(prompt, max_new_tokens=new, policy=policy, catch_up=options.catch_up)
        ):
            told.note(token.id)

    return "ease-lm", run


def transformers_eager(asked: dict[str, Any]) -> tuple[str, Run]:
    """The model's own loop with its cache, eager attention."""
    import torch

    model = load_transformers(asked)

    @torch.no_grad()
    def run(prompt: list[int], new: int, told: Told) -> None:
        inputs = torch.tensor([prompt])
        cache = None
        for _ in range(new):
            output = model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            inputs = output.logits[:, -1].argmax(-1, keepdim=True)
            told.note(int(inputs.item()))

    return "transformers", run


def transformers_early_exit(asked: dict[str, Any]) -> tuple[str, Run]:
    """Self-speculation: drafts of one early exit, judged at full depth (LayerSkip, as `generate` has it)."""
    import torch

    model = load_transformers(asked)
    model.generation_config.eos_token_id = None

    @torch.no_grad()
    def run(prompt: list[int], new: int, told: Told) -> None:
        ids = torch.tensor([prompt])
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            assistant_early_exit=asked["exit_layer"],
            streamer=told,
        )

    return "transformers", run


def load_transformers(asked: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(num_threads(asked))
    model: Any = AutoModelForCausalLM.from_pretrained(
        asked["checkpoint"], dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def onnxruntime_genai(asked: dict[str, Any]) -> tuple[str, Run]:
    """A model that its own builder has made of the checkpoint, once."""
    import onnxruntime_genai as og

    folder = Path(asked["built"])
    if not folder.is_dir():
        build_genai(folder, asked)
    model = og.Model(str(folder))

    def run(prompt: list[int], new: int, told: Told) -> None:
        parameters = og.GeneratorParams(model)
        length = len(prompt) + new
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(model, parameters)
        generator.append_tokens(prompt)
        for _ in range(new):
            generator.generate_next_token()
            told.note(int(generator.get_next_tokens()[0]))

    return "onnxruntime-genai", run


def build_genai(folder: Path, asked: dict[str, Any]) -> None:
    """Make the builder's model, whole or not at all."""
    import subprocess

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
    ]
    done = subprocess.run(
        [*command, "-p", asked["precision"], "-e", "cpu", "-c", str(cache)],
        capture_output=True,
        text=True,
        check=False,
    )
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


def llama_cpp(asked: dict[str, Any]) -> tuple[str, Run]:
    """A GGUF file in llama.cpp, as its own server runs it (in this process); times are those it
    takes itself.
    """
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = asked["gguf"]
    parameters.n_ctx = asked["context"]
    parameters.n_parallel = 1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = num_threads(asked)
    server = xllamacpp.Server(parameters)
    greedy = {
        "temperature": 0.0,
        "ignore_eos": True,
        "cache_prompt": False,
        "verbose": True,
        "return_tokens": True,
    }

    def run(prompt: list[int], new: int, told: Told) -> None:
        answer = server.handle_completions({"prompt": prompt, "n_predict": new, **greedy})
        if "timings" not in answer:
            raise RuntimeError(str(answer))
        first = answer["timings"]["prompt_ms"] / 1e3  # its answer begins with the prompt's last token
        told.clock = [0.0, first, first + answer["timings"]["predicted_ms"] / 1e3]
        told.ids = answer["__verbose"]["tokens"]

    return "xllamacpp", run


RUNTIMES: dict[str, Callable[[dict[str, Any]], tuple[str, Run]]] = {
    "ease": ease,
    "transformers eager": transformers_eager,
    "transformers early exit": transformers_early_exit,
    "onnxruntime-genai": onnxruntime_genai,
    "llama.cpp": llama_cpp,
}

if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
