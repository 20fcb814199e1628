"""git, asked about a repository. Nothing here imports torch, as lab/grade.py starts without it."""
import subprocess
from pathlib import Path

from lib.cli import UserError


def git(*words, where: Path) -> str:
    """What a git command prints in the folder `where`. Raises UserError with the last line of its
    message where it fails: no repository, no such commit or file, a patch that does not apply."""
    try:
        done = subprocess.run(["git", *map(str, words)], cwd=where, capture_output=True, text=True,
                              errors="replace")
    except OSError as error:
        raise UserError(f"git can't be started: {error.strerror}") from None
    if done.returncode:
        raise UserError(f"git {words[0]}: {(done.stderr.strip() or 'failed').splitlines()[-1]}")
    return done.stdout.rstrip()     # not from the left: a line of `git status` begins with a space


def git_or_none(*words, where: Path) -> str | None:
    """The same, but None where it fails."""
    try:
        return git(*words, where=where)
    except UserError:
        return None
