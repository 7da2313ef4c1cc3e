#!/bin/sh
# Check, build and tag the version that pyproject.toml names. Nothing is uploaded.
set -eu
fail() { echo "error: $*" >&2; exit 1; }

version=$(python -c "import tomllib; print(tomllib.load(open('pyproject.toml', 'rb'))['project']['version'])")
[ -z "$(git status --porcelain)" ] || fail "the working tree has changes; commit or stash them"
grep -q "^## \[$version\]" CHANGELOG.md || fail "CHANGELOG.md has no heading '## [$version]'; name the unreleased one so"
[ -z "$(git tag --list "v$version")" ] || fail "the tag v$version is there already; raise the version in pyproject.toml"

echo "== checks, tests and the site"
make check test site
echo "== the wheel and the source distribution of $version, in dist/"
rm -rf dist
python -m build --quiet
python -m twine check --strict dist/*
git tag --annotate "v$version" --message "Version $version"
echo "tagged v$version; dist/ has what an index would take: $(ls dist | tr '\n' ' ')"
