"""Statements of the packages (ast nodes) at some commits, side by side.

    python scripts/count_statements.py 531d37e HEAD

Unlike lines, they do not grow with a narrower page. Docstrings count for nothing; a tuple-packed assignment
(`a, b = 1, 2`) counts as its parts.
"""

import ast
import subprocess
import sys
from collections import Counter

PACKAGES = ("ease_common", "ease_train", "ease_export", "ease_runtime", "eval/ease_eval")


def statements(source: str) -> int:
    """How many there are in a file."""
    return sum(weight(node) for node in ast.walk(ast.parse(source)))


def weight(node: ast.AST) -> int:
    """What a node counts for: 0 unless it is a statement."""
    if not isinstance(node, ast.stmt) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    ):
        return 0
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
        targets = [target for target in node.targets if isinstance(target, ast.Tuple)]
        return max((len(target.elts) for target in targets), default=1)
    return 1


def git(*arguments: str) -> str:
    """What git says."""
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout


def counts(commit: str) -> Counter[str]:
    """The statements of each package at a commit."""
    files = [
        name for name in git("ls-tree", "-r", "--name-only", commit).splitlines() if name.endswith(".py")
    ]
    return Counter(
        {
            package: sum(
                statements(git("show", f"{commit}:{name}"))
                for name in files
                if name.startswith(f"{package}/")
            )
            for package in PACKAGES
        }
    )


def main() -> None:
    commits = sys.argv[1:] or ["HEAD"]
    found = [counts(commit) for commit in commits]
    print(f"{'':16}", *(f"{commit[:12]:>12}" for commit in commits))
    for package in PACKAGES:
        print(f"{package:16}", *(f"{count[package]:12}" for count in found))
    print(f"{'in all':16}", *(f"{count.total():12}" for count in found))


if __name__ == "__main__":
    main()
