"""Every shell line and script that the launchers make passes shellcheck, with the shells that they start."""

import itertools
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import launchers
import pytest

RUN = ("--action=run", "--command=python -m msn_jax.train --workdir=x", "--env=A=it's  b")
SUBMIT = (
    "--action=submit",
    "--name=msn",
    "--time=60",
    "--command=python -m msn_jax.train --distributed",
    "--env=A=b c",
)
TPU_VM = ("tpu_vm.py", "--name=msn", "--zone=z")
GPU_HOST = ("gpu_host.py", "--host=gpu1")
COMMANDS = [
    (*TPU_VM, "--action=setup"),
    (*TPU_VM, *RUN),
    (*TPU_VM, "--action=logs"),
    (*GPU_HOST, "--action=setup"),
    (*GPU_HOST, *RUN),
    (*GPU_HOST, "--action=logs"),
    (*GPU_HOST, "--action=stop"),
    ("slurm.py", *SUBMIT),
    ("slurm.py", *SUBMIT, "--requeue", "--gpus_per_node=8", "--tasks_per_node=1", "--container=docker://x"),
    ("slurm.py", "--action=status", "--name=msn"),
    ("slurm.py", "--action=logs", "--name=msn"),
    ("slurm.py", "--action=cancel", "--name=msn"),
]
# Notes that do not apply: the file that is sourced is not there; a trap calls the function; single quotes keep what
# another shell expands.
EXCLUDED = "SC1091,SC2329,SC2016"


def shellcheck(script: str, shell: str) -> str:
    """What shellcheck has to say, in its strictest severity."""
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program, "install the extra `test`"
    argv = [program, f"--shell={shell}", "--severity=style", f"--exclude={EXCLUDED}", "-"]
    result = subprocess.run(argv, input=script, capture_output=True, text=True)
    assert result.returncode in (0, 1), result.stderr
    return result.stdout


def scripts(text: str) -> list[tuple[str, str]]:
    """(script, shell) of the printed commands, and of each script within: for ssh, sbatch or bash -c."""
    found = [(text, "sh")]
    text, _, batch = text.partition(" <<'END'\n")
    found += [(batch.removesuffix("END\n"), "bash")] if batch else []
    words = [shlex.split(line) for line in text.splitlines()]
    found += [(argv[2], "sh") for argv in words if argv[0] == "ssh"]
    found += [(word.removeprefix("--command="), "bash") for argv in words for word in argv if word[:10] == "--command="]
    for script, _ in found[1:]:
        words = shlex.split(script)
        found += [(after, "bash") for before, after in itertools.pairwise(words) if before == "-c"]
    return [(script, shell) for script, shell in found if not script.startswith("import ")]  # of python -c


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[:3]))
def test_shellcheck_is_silent(command):
    for script, shell in scripts(launchers.dry_run(*command)):
        assert not shellcheck(script, shell)


def test_all_scripts_are_found():
    tpu, gpu = (scripts(launchers.dry_run(*command)) for command in ((*TPU_VM, *RUN), (*GPU_HOST, *RUN)))
    for found, shell in ((tpu, "bash"), (gpu, "sh")):
        (_, outer), (line, login), (inner, last) = found
        assert (outer, login, last) == ("sh", shell, "bash")
        assert line.startswith("cd msn_jax && ") and inner.startswith("trap : TERM; ")
    (_, outer), (batch, shell), (task, last) = scripts(launchers.dry_run("slurm.py", *SUBMIT))
    assert (outer, shell, last) == ("sh", "bash", "bash")
    assert batch.startswith("#!/bin/bash\n") and task.startswith("trap : TERM; ")


def test_shellcheck_finds_a_mistake():
    assert "SC2086" in shellcheck("rm $1\n", "sh")
