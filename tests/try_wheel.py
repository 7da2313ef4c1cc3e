"""What an installed wheel without extras does: every --help, a line for each extra, and a bundle's text.

python tests/try_wheel.py BUNDLE    # with the Python of an environment that holds the wheel and nothing else
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

BIN = Path(sys.executable).parent
PROGRAMS = ("ease-train", "ease-export", "ease-run", "ease-eval")
WITHOUT_EXTRAS = {  # what a command says where its extra is missing
    "ease-train fit demo --out none": "torch is not installed; install it: pip install 'ease-lm[train]'",
    "ease-train import model.gguf --out none": "pip install 'ease-lm[",
    "ease-export build none none": "pip install 'ease-lm[train]'",
    "ease-eval report {bundle} --out out.html": "pip install 'ease-lm[eval]'",
    "ease-eval lm-eval --help": "pip install 'ease-lm[lm-eval]'",
    "ease-run serve {bundle}": "pip install 'ease-lm[serve]'",
    "ease-run generate {bundle} --prompt And --regex [ab]+": "pip install 'ease-lm[grammar]'",
}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as nowhere:  # so that nothing is imported from a checkout
        return subprocess.run(
            [str(BIN / command[0]), *command[1:]], capture_output=True, text=True, cwd=nowhere, timeout=120
        )


def help_pages(*command: str) -> Iterator[tuple[str, ...]]:
    """A command and those below it, each of which has told its --help."""
    done = run(*command, "--help")
    assert done.returncode == 0, (command, done.stderr)
    yield command
    _, _, below = done.stdout.partition("\nCommands:\n")
    for name in re.findall(r"^  (\S+)", below, re.M):
        if name != "lm-eval":  # whose --help is that of lm_eval itself
            yield from help_pages(*command, name)


def main(bundle: str) -> None:
    bundle = str(Path(bundle).resolve())
    told = [page for program in PROGRAMS for page in help_pages(program)]
    assert len(told) > 25, told
    for command, line in WITHOUT_EXTRAS.items():
        done = run(*command.format(bundle=bundle).split())
        assert done.returncode == 1, (command, done)
        assert line in done.stderr, (command, done.stderr)
        assert done.stderr.count("\n") == 1, (command, done.stderr)
    said = run(
        "ease-run", "generate", bundle, "--prompt", "And the king", "--max-tokens", "8", "--threshold", "0"
    )
    assert said.returncode == 0, said.stderr
    assert said.stdout.strip(), "it says something"
    shipped = run("ease-run", "generate", "ease:code", "--prompt", "def f(x):", "--max-tokens", "8")
    assert shipped.returncode == 0, shipped.stderr
    print(f"{len(told)} --help, {len(WITHOUT_EXTRAS)} lines about extras, a text: as they should be")


if __name__ == "__main__":
    main(sys.argv[1])
