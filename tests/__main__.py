"""The tests, with nothing installed beforehand: python3 tests [pytest's arguments]

Makes a private environment (.venv-tests, which git ignores), installs pytest into it and runs the core tests, in two
halves side by side unless files are named. The network is needed the first time only. This file itself runs on any Python 3, to be able to say which one is needed.
"""
import os
import subprocess
import sys
import tempfile

NEEDED = (3, 11)
PYTEST = "pytest>=8,<10"
REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ENVIRONMENT = os.path.join(REPOSITORY, ".venv-tests")
PYTHON = os.path.join(ENVIRONMENT, *(("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")))


def version(numbers):
    return ".".join(str(number) for number in numbers)


def has_pytest():
    """Is there an environment of this Python's version, with a pytest that is new enough?"""
    code = "import sys, pytest; sys.exit(sys.version_info[:2] != %r or pytest.version_tuple < (8,))" % (
        tuple(sys.version_info[:2]),)
    try:
        return subprocess.call([PYTHON, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0
    except OSError:
        return False


def make_environment():
    """None, or the sentence that says what is missing."""
    try:
        import ensurepip  # noqa: F401
        import venv
    except ImportError:
        return ("This Python cannot make environments. On Debian and Ubuntu: apt install python3-venv (or python%s-venv)."
                % version(sys.version_info[:2]))
    print("Making %s with pytest ..." % ENVIRONMENT, file=sys.stderr)
    venv.EnvBuilder(clear=True, with_pip=True).create(ENVIRONMENT)
    pip = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", PYTEST]
    if subprocess.call(pip) != 0:
        return "pytest could not be installed into %s; pip's words are above. The first run needs its index." % ENVIRONMENT
    return None


def main(arguments):
    if sys.version_info[:2] < NEEDED:
        return "The tests need Python %s or newer; this is %s at %s." % (
            version(NEEDED), version(sys.version_info[:3]), sys.executable)
    trouble = None if has_pytest() else make_environment()
    if trouble:
        return trouble
    command = [PYTHON, "-m", "pytest"] + arguments
    if any(not argument.startswith("-") for argument in arguments) or (os.cpu_count() or 1) < 2:
        return subprocess.call(command, cwd=REPOSITORY)
    files = sorted(name for name in os.listdir(os.path.dirname(os.path.abspath(__file__))) if name.startswith("test_"))
    halves = [["tests/" + name for name in files[start::2]] for start in (0, 1)]        # two cores, two runs
    with tempfile.TemporaryFile() as kept:
        beside = subprocess.Popen(command + halves[1], cwd=REPOSITORY, stdout=kept, stderr=subprocess.STDOUT)
        first = subprocess.call(command + halves[0], cwd=REPOSITORY)
        second = beside.wait()
        kept.seek(0)
        sys.stdout.write(kept.read().decode("utf-8", "replace"))
    return first or second


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
