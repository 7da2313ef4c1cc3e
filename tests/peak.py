"""How much anonymous memory something takes in a process of its own, beyond what is there before."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, sys, threading
from pathlib import Path

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

def watch():
    global most
    while not done.wait(0.001):
        most = max(most, anonymous())

names = {}
exec(sys.argv[1], names)
before = most = anonymous()
done = threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
exec(sys.argv[2], names)
done.set()
watcher.join()
print(json.dumps(most - before))
"""


def grown_by(prepared: str, code: str) -> int:
    """The bytes by which anonymous memory is larger at the most while `code` runs, after `prepared`."""
    command = [sys.executable, "-c", SCRIPT, prepared, code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    found: int = json.loads(done.stdout.splitlines()[-1])
    return found
