"""A command that gets a signal at a moment which is given by what it does, not by the clock."""

import subprocess
import sys

HIT = """
import os, signal, sys

event, part, count, number = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
seen = 0

def once_more():
    global seen
    seen += 1
    if seen == count:
        os.kill(os.getpid(), number)

def audited(name, arguments):
    if name == event and part in str(arguments[0]):
        once_more()

def profiled(frame, what, _):
    if what == "call" and frame.f_code.co_qualname == part:
        once_more()

sys.setprofile(profiled) if event == "call" else sys.addaudithook(audited)
import ease_start
script, sys.argv = sys.argv[5], ["ease", *sys.argv[6:]]
getattr(ease_start, script)()
"""
Moment = tuple[str, str, int]  # an audited event ("open", "import", ...) or "call", of what, the n-th time


def interrupted(
    moment: Moment,
    number: int,
    script: str,
    *arguments: str,
    said: str = "",
) -> tuple[int, list[str]]:
    """Run a command, with `said` on its standard input, that gets a signal at a moment: its exit code, and
    the lines on stderr.
    """
    event, part, count = moment
    told = [event, part, str(count), str(int(number)), script, *arguments]
    done = subprocess.run(
        [sys.executable, "-c", HIT, *told],
        input=said,
        capture_output=True,
        text=True,
    )
    return done.returncode, [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()]
