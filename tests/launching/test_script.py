"""programs/script.py and script_job: a person's program sees what plain Python gives it.

The same probe runs under plain Python and as a worker, and both must say the same.
"""

import json
import os
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from scaletrain.cli import cli
from scaletrain.errors import UserError
from scaletrain.launching.job import Program, script_job
from scaletrain.run.layout import RunDir

PYTHON = (sys.executable,)

# Says all that it sees, as a line of JSON. Its ends are those of a program that uses what a main
# module may: child processes of both kinds, a thread that outlives it, exit handlers.
PROBE = """\
'''A probe.'''
import atexit, inspect, json, linecache, multiprocessing, os, pickle, sys, threading, time
first_names = sorted(globals())

class Thing:
    kept = 1

def square(number):
    return number * number

def after_the_main_module():
    threading.main_thread().join()
    print("thread", pickle.loads(pickle.dumps(Thing)) is Thing, square(3), flush=True)

if __name__ == "__main__":
    seen = {
        "names": first_names, "name": __name__, "doc": __doc__, "package": __package__,
        "spec": __spec__ and __spec__.name, "loader": str(__loader__).split(" object")[0],
        "file": globals().get("__file__"), "cached": str(globals().get("__cached__")),
        "argv": sys.argv, "path": sys.path[:2], "builtins": type(__builtins__).__name__,
        "is_main": sys.modules["__main__"].__dict__ is globals(),
        "flags": [sys.flags.optimize, sys.flags.dont_write_bytecode, sys.warnoptions],
        "orig_argv": sys.orig_argv,
        "code": square.__code__.co_filename,
        "hooks": [sys.excepthook is sys.__excepthook__, sys.breakpointhook is sys.__breakpointhook__],
        "pickle": pickle.loads(pickle.dumps(Thing)) is Thing,
    }
    try:
        seen["source"] = inspect.getsource(Thing)
        seen["line"] = linecache.getline(__file__, 2)
    except Exception as error:
        seen["source"] = repr(error)
    try:
        import yaml
        seen["neighbour"] = yaml.__file__
    except ImportError:
        pass
    if "__file__" in globals():
        # A child that is spawned does not load a __main__.py.
        for method in ("fork",) if __file__.endswith("__main__.py") else ("fork", "spawn"):
            with multiprocessing.get_context(method).Pool(1) as pool:
                seen[method] = pool.map(square, [1, 2])
    print(json.dumps(seen), flush=True)
    atexit.register(print, "exit 1", flush=True)
    atexit.register(print, "exit 2", flush=True)
    threading.Thread(target=after_the_main_module).start()
    print("end", flush=True)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A working directory with the probe as a script, a module, a directory and a zip file."""
    for name in ("probe.py", "package/probe.py", "package/__main__.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(PROBE)
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "package" / "yaml.py").touch()  # beside the script, of a name that we import
    (tmp_path / "link.py").symlink_to("package/probe.py")
    with zipfile.ZipFile(tmp_path / "probe.zip", "w") as archive:
        archive.writestr("__main__.py", PROBE)
    return tmp_path


def environ(**variables: str) -> dict[str, str]:
    """Return the environment of a worker that runs alone and meets nobody."""
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    hidden = ("PYTHONPATH", "PYTHONSAFEPATH", "PYTHONDONTWRITEBYTECODE", "SCALETRAIN_LAUNCH")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return kept | place | variables


def run(
    argv: tuple[str, ...], folder: Path, text: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv,
        cwd=folder,
        env=environ(**variables),
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
    )


def as_worker(command: tuple[str, ...], folder: Path) -> tuple[str, ...]:
    return script_job(command, 1, folder / "run").argv


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("probe.py", "--workers", "3"),
        ("package/../link.py",),
        ("-O", "-B", "-Werror::ImportWarning", "-m", "package.probe", "x"),
        ("-mpackage",),
        ("package", "x"),
        ("probe.zip",),
        ("-c", PROBE, "x", "-m"),
        ("-P", "probe.py"),
    ],
    ids=["file", "link", "module", "package", "directory", "zip", "code", "safe-path"],
)
def test_a_program_sees_what_plain_python_gives_it(words: tuple[str, ...], project: Path):
    plain = run((*PYTHON, *words), project)
    assert plain.returncode == 0, plain.stderr
    ours = run(as_worker((*PYTHON, *words), project), project)
    assert ours.returncode == 0, ours.stderr
    expected = plain.stdout.splitlines()
    said = ours.stdout.splitlines()
    assert said[1:] == expected[1:]
    seen, wanted = json.loads(said[0]), json.loads(expected[0])
    # Python reports -mpackage and -Werror as two words here.
    if "-c" not in words:
        seen.pop("orig_argv"), wanted.pop("orig_argv")
    assert seen == wanted


@pytest.mark.slow
def test_pythonsafepath_holds_for_the_program(project: Path):
    plain = run((*PYTHON, "probe.py"), project, PYTHONSAFEPATH="1")
    ours = run(as_worker(("probe.py",), project), project, PYTHONSAFEPATH="1")
    assert (
        json.loads(ours.stdout.splitlines()[0])["path"]
        == (json.loads(plain.stdout.splitlines()[0])["path"])
    )


@pytest.mark.slow
def test_files_of_the_working_directory_hide_nothing_that_we_import(tmp_path: Path):
    """A script elsewhere runs, and so does the whole launch around it."""
    hostile = tmp_path / "here"
    hostile.mkdir()
    for name in ("select", "json", "scaletrain", "types", "torch", "queue", "selectors"):
        (hostile / f"{name}.py").write_text(f"raise RuntimeError('{name} of the directory')")
    (tmp_path / "script.py").write_text("import json, torch, scaletrain; print('ran')")
    scaletrain = Path(sys.executable).with_name("scaletrain")
    for launcher in ("local", "torchrun"):
        argv = (
            str(scaletrain), "launch", "--launcher", launcher,
            "--run-dir", str(tmp_path / launcher), "../script.py",
        )  # fmt: skip
        kept = {k: v for k, v in environ().items() if k not in ("RANK", "WORLD_SIZE")}
        done = subprocess.run(
            argv, cwd=hostile, env=kept, capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stdout) == (0, "ran\n"), done.stderr


ENDS = {
    "text": ("sys.exit('the text')", 1),
    "none": ("sys.exit(None)", 0),
    "number": ("sys.exit(300)", 44),
    "at once": ("os._exit(3)", 3),
    "raises": ("raise ValueError('wrong')", 1),
    "cancelled": ("import asyncio; raise asyncio.CancelledError", 1),
    "own hook": ("sys.excepthook = lambda *facts: print('hook', facts[1], facts[2].tb_lineno)\n1/0", 1),
    "syntax": ("1 +", 1),
    "forked child raises": (
        "pid = os.fork()\nif pid == 0: raise ValueError('of the child')\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))", 0,
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--workers", "3"], "--workers stands behind the command, and was passed on to it"),
        (["--workers=3"], "--workers=3 stands behind the command"),
        (["--epochs", "3"], ""),  # nobody's
    ],
)
def test_an_option_of_ours_behind_a_script_that_refuses_it_is_told(
    words: list[str], hint: str, tmp_path: Path
):
    (tmp_path / "refuses.py").write_text(
        "import argparse\nargparse.ArgumentParser().parse_args()\n"
    )
    launch = (*PYTHON, "-m", "scaletrain.cli", "launch", "--run-dir", "run")
    done = run((*launch, "refuses.py", *words), tmp_path)
    assert done.returncode == 2 and "unrecognized arguments" in done.stderr, done.stderr
    assert hint in done.stderr and ("stands behind" in done.stderr) == bool(hint), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("case", list(ENDS))
def test_a_program_ends_as_under_plain_python(case: str, tmp_path: Path):
    body, status = ENDS[case]
    (tmp_path / "ends.py").write_text(f"import os, sys\n{body}\n")
    plain = run((*PYTHON, "ends.py"), tmp_path)
    # A supervisor that shows failures is there: SCALETRAIN_SUPERVISED says so.
    ours = run(as_worker(("ends.py",), tmp_path), tmp_path, SCALETRAIN_SUPERVISED="1")
    assert plain.returncode == ours.returncode == status, ours.stderr
    assert ours.stdout == plain.stdout
    failure = RunDir(tmp_path / "run").failure(0)
    is_reported = case in ("raises", "cancelled", "own hook", "syntax")
    assert failure.exists() == is_reported
    if is_reported:
        reported = json.loads(failure.read_text())["traceback"]
        assert ours.stderr == "", "the supervisor shows it"
        if case != "own hook":
            assert reported == plain.stderr
    else:
        assert ours.stderr == plain.stderr


@pytest.mark.slow
def test_rank_0_has_standard_input_and_the_others_pass_breakpoints(tmp_path: Path):
    (tmp_path / "asks.py").write_text(
        textwrap.dedent("""
        import os, sys
        secret = "not " * int(os.environ["RANK"]) + "rank 0"
        breakpoint()
        print("rest:", sys.stdin.read().split())
        """)
    )
    result = run(
        (
            "env", "-u", "RANK", "-u", "WORLD_SIZE",
            str(Path(sys.executable).with_name("scaletrain")), "launch", "-n", "2",
            "--run-dir", "run", "asks.py",
        ),
        tmp_path,
        "p secret\ncontinue\nfor the script\n",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "[rank 0] (Pdb) 'rank 0'" in result.stdout
    assert "[rank 0] (Pdb) rest: ['for', 'the', 'script']" in result.stdout
    assert "[rank 1] rest: []" in result.stdout
    assert "rank 1 goes on past breakpoint()" in result.stderr


@pytest.mark.parametrize(
    ("command", "options", "words"),
    [
        (("train.py", "-m", "x"), (), ("train.py", "-m", "x")),
        (("-m", "package.train", "-u"), (), ("-m", "package.train", "-u")),
        ((sys.executable, "-uO", "-Wignore", "-X", "dev", "train", "-c"), ("-u", "-O", "-W", "ignore", "-X", "dev"), ("train", "-c")),
        ((sys.executable, "-umpackage"), ("-u",), ("-m", "package")),
        ((sys.executable, "-I", "-c", "pass"), ("-I",), ("-P", "-c", "pass")),
    ],
)  # fmt: skip
def test_python_programs_are_recognised(
    command: tuple[str, ...], options: tuple[str, ...], words: tuple[str, ...]
):
    job = script_job(command, 2, Path("/shared/run"))
    assert (job.program, job.python_options, job.command) == (Program.SCRIPT, options, words)
    assert job.argv[: len(options) + 2] == (sys.executable, *options, "-P")


@pytest.mark.parametrize(
    "command",
    [
        ("./simulate", "train.py"),
        (sys.executable, "-V"),
        (sys.executable, "-i", "train.py"),
        (sys.executable, "-"),
        (sys.executable,),
        ("/usr/lib/another/bin/python3", "train.py"),
    ],
)
def test_other_commands_run_as_they_are(command: tuple[str, ...]):
    job = script_job(command, 2, Path("/shared/run"))
    assert job.program is None and job.argv == command


def test_an_unknown_option_as_command_is_refused():
    with pytest.raises(UserError, match="'-z' is not allowed"):
        script_job(("-z", "train.py"), 2, Path("/shared/run"))


@pytest.mark.parametrize("words", [["missing.py"], [sys.executable, "-u", "missing"]])
def test_a_missing_script_is_one_line(words: list[str]):
    result = CliRunner().invoke(cli, ["launch", "--", *words])
    assert isinstance(result.exception, UserError)
    assert str(result.exception) == f"{words[-1]}: there is no such file"
