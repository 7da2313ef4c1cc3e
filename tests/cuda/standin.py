"""Stand-ins for the CUDA libraries that ONNX Runtime's CUDA provider names, and processes that run over them.

The wheel's own provider then places nodes, chooses kernels and dispatches them, without a GPU: see standin.c.
Linux on x86-64.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnxruntime
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection

PROVIDER = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
RUNTIME = "libcudart.so.13"
LOADED_BY_NAME = ("libcuda.so.1", "libcurand.so.10")  # named without a symbol
HERE = Path(__file__).parent


def needed_symbols() -> dict[str, str]:
    """The functions that the provider takes from CUDA's libraries, and the library of each."""
    with PROVIDER.open("rb") as file:
        elf = ELFFile(file)
        library_of = {}  # by the number of a symbol's version
        for section in elf.iter_sections():
            if isinstance(section, GNUVerNeedSection):
                for needed, versions in section.iter_versions():
                    library_of.update({version["vna_other"]: needed.name for version in versions})
        symbols = elf.get_section_by_name(".dynsym")
        versions = elf.get_section_by_name(".gnu.version")
        found = {}
        for number, symbol in enumerate(symbols.iter_symbols()):
            library = library_of.get(versions.get_symbol(number)["ndx"], "")
            if symbol["st_shndx"] == "SHN_UNDEF" and library.startswith("libcu"):
                found[symbol.name] = library
    return found


def compiler() -> list[str]:
    """The C compiler that is there, else the one that pip brings."""
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return [path]
    return [sys.executable, "-m", "ziglang", "cc"]


def build(folder: Path) -> Path:
    """Compile the stand-ins into a folder, for LD_LIBRARY_PATH.

    What neither source defines is a function that notes its name and returns 0. Versions are those the
    provider asks for.
    """
    symbols = needed_symbols()
    assert RUNTIME in symbols.values(), f"{PROVIDER} names no {RUNTIME}: this test knows CUDA 13"
    for library in (RUNTIME, *sorted({*symbols.values(), *LOADED_BY_NAME} - {RUNTIME})):
        names = sorted(name for name, home in symbols.items() if home == library)
        stubs = (
            f'__attribute__((weak)) int {name}() {{ standin_note("{name}"); return 0; }}' for name in names
        )
        generated = folder / f"{library}.c"
        generated.write_text("\n".join(("void standin_note(const char *name);", *stubs)) + "\n")
        versions = folder / f"{library}.map"
        versions.write_text(f"{library} {{ global: *; }};\n")
        sources = [generated, HERE / ("standin.c" if library == RUNTIME else "products.c")]
        others = ["-ldl"] if library == RUNTIME else [f"-L{folder}", f"-l:{RUNTIME}"]
        flags = [
            "-shared",
            "-fPIC",
            "-O1",
            "-w",
            f"-Wl,--version-script={versions}",
            f"-Wl,-soname,{library}",
        ]
        command = [*compiler(), *flags, "-o", folder / library, *sources, *others]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return folder


@dataclass(frozen=True)
class Event:
    """A line of the log: "kernel", "copy", "sync", "malloc", "memset", "call", "replay", "begin" or "end" (of
    a capture). `stream` is where it knows one: CUDA's default stream is 0.
    """

    kind: str
    what: str
    captured: bool
    stream: int | None

    @property
    def num_bytes(self) -> int:
        """Of a copy, a memset or a malloc."""
        return int(self.what.split()[-1])


def events(log: Path) -> Iterator[Event]:
    """What happened, in order."""
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        captured = line.startswith("captured ")
        line, _, stream = line.removeprefix("captured ").partition(" stream ")
        kind, _, what = line.partition(" ")
        yield Event(kind, what, captured, int(stream) if stream else None)


def run_over(libraries: Path, arguments: list[str], log: Path | None = None, capability: int = 80) -> str:
    """What a Python process over the stand-ins prints. `capability`: of the card, times ten."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries), "STANDIN_CC": str(capability)}
    if log is not None:
        environment["STANDIN_LOG"] = str(log)
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
