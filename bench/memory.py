"""The memory and the time that a command takes, of it and its children one after the other.

    python bench/memory.py ease-train import runs/scale/1b --out runs/scale/1b-checkpoint

Anonymous memory is what the system cannot have back without swapping; resident memory has files that are
mapped with it. Read every 10 ms from /proc (Linux).
"""

import subprocess
import sys
import time
from pathlib import Path

INTERVAL = 0.01  # seconds
FIELDS = ("RssAnon", "VmRSS")


def memory_of(process: int) -> dict[str, int]:
    """Bytes of a process by field; none once it is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    values = dict(line.split(":", 1) for line in lines)
    return {name: 1024 * int(values[name].split()[0]) for name in FIELDS if name in values}


def peaks_of(command: list[str]) -> tuple[int, float, dict[str, int]]:
    """A command's exit code, seconds, and the most that it had of each field."""
    peaks = dict.fromkeys(FIELDS, 0)
    began = time.perf_counter()
    running = subprocess.Popen(command)
    while running.poll() is None:
        for name, size in memory_of(running.pid).items():
            peaks[name] = max(peaks[name], size)
        time.sleep(INTERVAL)
    return running.returncode, time.perf_counter() - began, peaks


def main() -> None:
    """Run the command line, and say what it took."""
    code, seconds, peaks = peaks_of(sys.argv[1:])
    said = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in peaks.items())
    print(f"{seconds:.1f} s, at most {said}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
