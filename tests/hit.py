"""A command that gets a signal at a moment which is given by what it does, not by the clock."""

import subprocess
import sys

HIT = """
import os, signal, sys

event, part, count, number = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
seen = 0

def hit(name, arguments):
    global seen
    if name == event and part in str(arguments[0]):
        seen += 1
        if seen == count:
            os.kill(os.getpid(), number)

sys.addaudithook(hit)
import ease_start
script, sys.argv = sys.argv[5], ["ease", *sys.argv[6:]]
getattr(ease_start, script)()
"""


def interrupted(
    moment: tuple[str, str, int], number: int, script: str, *arguments: str
) -> tuple[int, list[str]]:
    """Run a command that gets a signal at a moment: its exit code, and the lines on stderr."""
    event, part, count = moment
    told = [event, part, str(count), str(int(number)), script, *arguments]
    done = subprocess.run([sys.executable, "-c", HIT, *told], capture_output=True, text=True)
    return done.returncode, [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()]
