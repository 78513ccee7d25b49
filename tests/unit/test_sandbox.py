"""Attacks on the sandbox: each is contained, soon, and leaves everything around it as it was."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dynalora.errors import ConfigError, UnsupportedError
from dynalora.evaluation import sandbox
from dynalora.evaluation.sandbox import Limits, Outcome, Program, check_sandbox, run_program

SMALL = Limits(seconds=1.0, patience=20, memory=128 << 20, file_size=1 << 20, disk=4 << 20)


def _contained() -> bool:
    try:
        check_sandbox()
    except UnsupportedError:
        return False
    return True


needs_walls = pytest.mark.skipif(not _contained(), reason="this system cannot contain programs")


def run(program: str) -> Outcome:
    began = time.monotonic()
    outcome = run_program(program, SMALL)
    # One second of processor time, with generous room for a busy machine.
    assert time.monotonic() - began < 60
    return outcome


@needs_walls
def test_programs_that_behave() -> None:
    assert run("import math, re, heapq, collections, itertools, typing\nassert math.gcd(4, 6) == 2") == Outcome(
        True, "", pytest.approx(0, abs=10)
    )
    own_files = "open('a', 'w').write('hi')\nimport os\nassert open('a').read() == 'hi' and os.listdir() == ['a']"
    assert run(own_files).passed
    assert run("print('x' * 10**6)").passed  # nobody reads it
    assert not run("assert 1 == 2").passed
    assert run("def f(:").reason.startswith("SyntaxError")


@needs_walls
def test_a_package_is_there_when_it_is_given_and_nothing_beside_it() -> None:
    import numpy

    beside = Path(numpy.__file__).parent.parent
    if beside.is_relative_to(sys.base_prefix):
        pytest.skip("NumPy lies in Python's own library, all of which can be read")
    program = f"""
import numpy as np
import numpy.polynomial, numpy.ma  # read only now
np.testing.assert_allclose([1.0], [1.0 + 1e-9])
import sys
assert {str(beside)!r} not in sys.path
import os
try:
    os.listdir({str(beside)!r})
except PermissionError:
    pass
else:
    raise RuntimeError("what lies beside NumPy can be listed")
try:
    import torch
except ImportError:
    pass
else:
    raise RuntimeError("torch can be imported")
"""
    outcome = run_program(program, SMALL, packages=["numpy.testing"])
    assert outcome.passed, outcome.reason
    assert run("import numpy").reason.startswith("ModuleNotFoundError")
    with pytest.raises(ConfigError, match="needs the package 'nothing_like_it', which is not installed"):
        run_program("pass", packages=["nothing_like_it"])


@needs_walls
@pytest.mark.parametrize(
    "end", ["import os; os._exit(0)", "raise SystemExit(0)", "import sys; sys.exit()", "quit_ = exit"]
)
def test_leaving_early_is_not_passing(end: str) -> None:
    assert not run(f"{end}\nassert False").passed


@needs_walls
def test_an_endless_loop_and_a_long_sleep_end() -> None:
    assert run("while True: pass").reason == "timed out"
    deaf = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    assert run(deaf).reason in ("killed by SIGKILL", "timed out")
    began = time.monotonic()
    slept = run_program("import time\ntime.sleep(600)", Limits(seconds=1, patience=1.5))
    assert slept.reason == "timed out"
    assert 1.5 <= slept.seconds < time.monotonic() - began < 60


@needs_walls
def test_a_fork_bomb_does_not_get_to_its_first_fork() -> None:
    mark = f"sandboxed-{os.getpid()}-{time.monotonic_ns()}"
    outcome = run(f"import os\nname = '{mark}'\nwhile True: os.fork()")
    assert outcome.reason.startswith("PermissionError")
    threads = run("import threading\nwhile True: threading.Thread(target=lambda: None).start()")
    assert threads.reason.startswith("RuntimeError: can't start new thread")
    for call in ("os.posix_spawn('/bin/true', ['true'], {})", "os.execv('/bin/true', ['true'])"):
        assert "PermissionError" in run(f"import os\n{call}").reason
    assert "PermissionError" in run("import subprocess\nsubprocess.run(['/bin/true'])").reason


@needs_walls
def test_a_memory_bomb_bursts_inside() -> None:
    assert run("x = []\nwhile True: x.append(bytearray(10**7))").reason == "MemoryError"
    assert run("import mmap\nmmap.mmap(-1, 10**9)").reason.startswith("OSError")
    assert not run("import os\nos.memfd_create('a')").passed
    raised = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (10**12, 10**12))"
    assert not run(raised).passed


@needs_walls
def test_large_and_many_files_are_stopped() -> None:
    assert run("open('a', 'wb').write(b'a' * (2 << 20))").reason.startswith("OSError")
    assert run("i = 0\nwhile True:\n  open(str(i), 'wb').write(b'a' * (1 << 20)); i += 1").reason == ("too much disk")
    assert run("i = 0\nwhile True:\n  open(str(i), 'w').close(); i += 1").reason in ("too much disk", "timed out")


@needs_walls
def test_nothing_outside_is_written(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("whole")
    victim.chmod(0o640)
    for attack in (
        f"open({str(victim)!r}, 'w')",
        f"open({str(victim)!r}, 'a').write('x')",
        f"os.open({str(victim)!r}, os.O_RDONLY | os.O_TRUNC)",
        f"os.truncate({str(victim)!r}, 0)",
        f"os.remove({str(victim)!r})",
        f"os.rename({str(victim)!r}, 'mine')",
        f"os.link({str(victim)!r}, 'mine')",
        f"os.symlink({str(victim)!r}, 'mine')",
        f"os.chmod({str(victim)!r}, 0o777)",
        f"os.utime({str(victim)!r}, (0, 0))",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        "open('../new', 'w')",
    ):
        assert "Error" in run(f"import os\n{attack}").reason, attack
        assert victim.read_text() == "whole", attack
    assert victim.stat().st_mode & 0o777 == 0o640
    assert victim.stat().st_mtime > 1e9
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["victim"]


@needs_walls
def test_the_home_and_the_environment_are_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "token"
    secret.write_text("hidden")
    monkeypatch.setenv("SECRET_TOKEN", "hidden")
    for attack in (
        f"open({str(secret)!r}).read()",
        f"os.listdir({str(Path.home())!r})",
        f"os.listdir({str(tmp_path)!r})",
        "open('/etc/passwd').read()",
        "open('/proc/self/environ').read()",
        f"open('/proc/{os.getpid()}/environ').read()",
        "os.listdir('/')",
    ):
        assert "PermissionError" in run(f"import os\n{attack}").reason, attack
    assert run("import os\nassert 'SECRET_TOKEN' not in os.environ and os.environ['HOME'] == os.getcwd()").passed
    # Whatever files the caller has open stay its own.
    with open(secret) as held:
        os.set_inheritable(held.fileno(), True)
        peek = f"import os\nassert os.read({held.fileno()}, 6) != b'hidden'"
        assert run(peek).reason != ""


@needs_walls
def test_no_socket_is_opened() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0.2)
        port = server.getsockname()[1]
        attack = f"import socket\nsocket.create_connection(('127.0.0.1', {port}))"
        assert "PermissionError" in run(attack).reason
        with pytest.raises(TimeoutError):
            server.accept()
    for family in ("AF_UNIX", "AF_INET6"):
        assert "Error" in run(f"import socket\nsocket.socket(socket.{family})").reason


@needs_walls
def test_no_other_process_is_signalled() -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        for attack in (
            f"os.kill({other.pid}, 9)",
            f"os.kill({os.getpid()}, 15)",
            "os.kill(-1, 9)",
            "os.kill(0, 9)",
            f"import fcntl\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, {other.pid})",
        ):
            assert "PermissionError" in run(f"import os\n{attack}").reason, attack
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


@needs_walls
def test_raw_system_calls_meet_the_same_walls() -> None:
    # fork, socket, unshare, ptrace, mount, io_uring_setup, clone and clone3.
    if platform.machine() != "x86_64":
        pytest.skip("numbers of x86-64")
    for call in (57, 41, 272, 101, 165, 425, 56, 435):
        program = f"import ctypes\nassert ctypes.CDLL(None).syscall({call}, 0, 0, 0, 0) == -1"
        assert run(program).passed, call


@needs_walls
def test_crashes_are_told_and_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert run("import os\nos.abort()").reason == "killed by SIGABRT"
    assert run("import ctypes\nctypes.string_at(0)").reason == "killed by SIGSEGV"
    every = "import os\nfor i in range(3, 60):\n  try:\n    {}\n  except OSError: pass"
    flood = every.format("while True: os.write(i, b'a' * 4096)")
    assert not run_program(flood, Limits(seconds=1, patience=2)).passed
    forged = every.replace("{}", """os.write(i, b'{"token": "guess"}\\n')""")
    assert not run(f"{forged}\nos._exit(0)").passed
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_guaranteed_it_refuses() -> None:
    refused = sandbox._run("pass", SMALL, weak=False, packages=(), pretend_weak=True)
    assert isinstance(refused, str)
    for attack, kind in (
        ("import socket\nsocket.socket()", "PermissionError"),
        ("open('/etc/passwd')", "PermissionError"),
        ("import os\nos.fork()", "PermissionError"),
        ("import os\nos.listdir('/')", "PermissionError"),
        ("import subprocess\nsubprocess.run(['true'])", "PermissionError"),
        ("while True: pass", "timed out"),
        ("x = [0] * 10**9", "MemoryError"),
        ("open('a', 'wb').write(b'a' * (2 << 20))", "OSError"),
    ):
        outcome = sandbox._run(attack, SMALL, weak=True, packages=(), pretend_weak=True)
        assert isinstance(outcome, Outcome)
        assert outcome.reason.startswith(kind), attack
    fine = sandbox._run("import math", SMALL, weak=True, packages=(), pretend_weak=True)
    assert isinstance(fine, Outcome)
    assert fine.passed


def test_the_refusal_says_why_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_run", lambda *args, **options: "Landlock is not available")
    with pytest.raises(UnsupportedError, match=r"cannot contain it \(Landlock is not available\).*--weak-sandbox"):
        run_program("pass")


@pytest.mark.parametrize("bad", [{"seconds": 0}, {"memory": 1000}, {"disk": -1}, {"file_size": -1}])
def test_limits_are_checked(bad: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"limit {next(iter(bad))} is"):
        Limits(**bad)


@needs_walls
def test_what_a_program_writes_into_the_launchers_pipe_ends_nothing_and_proves_nothing() -> None:
    for text in ('{"refused": "no walls"}', '{"token": "guessed"}', '{"ready": true}\n{"refused": "x"}', "[" * 5000):
        written = f"import os\nfor fd in range(3, 20):\n    try:\n        os.write(fd, {text.encode()!r} + b'\\n')\n"
        for end in ("os._exit(1)", "os._exit(0)", "raise SystemExit"):
            outcome = run(f"{written}    except OSError:\n        pass\n{end}")
            assert not outcome.passed


@needs_walls
@pytest.mark.parametrize(
    "hold",
    [
        # Held by a descriptor, by a mapping alone, and moved over by another file.
        "os.unlink(name); held.append(f)",
        "held.append(mmap.mmap(f.fileno(), 4096, mmap.MAP_PRIVATE, mmap.PROT_READ)); f.close(); os.unlink(name)",
        "open('other', 'w').close(); os.replace('other', name); held.append(f)",
    ],
)
def test_files_that_are_held_without_a_name_count(hold: str) -> None:
    program = f"""
import mmap, os, time
held = []
for i in range(30):
    name = str(i)
    f = open(name, "w+b", buffering=0)
    f.write(b"a" * (1 << 20))
    {hold}
time.sleep(0.2)
"""
    assert run_program(program, SMALL).reason == "too much disk"
    assert "not supported" in run("import os\nos.open('.', os.O_TMPFILE | os.O_RDWR)").reason


@needs_walls
def test_programs_that_remove_their_files_go_on() -> None:
    program = """
import os, tempfile
for i in range(60):
    with tempfile.TemporaryFile(dir=".") as f:
        f.write(b"a" * 500_000)
        f.seek(0)
        assert len(f.read()) == 500_000
    with open("kept.new", "wb") as f:
        f.write(b"b" * 500_000)
    os.replace("kept.new", "kept")
    with tempfile.NamedTemporaryFile(dir=".") as f:
        f.write(b"c" * 500_000)
for i in range(100):
    open(f"small{i}", "w").close()
for i in range(100):
    os.remove(f"small{i}")
assert os.listdir() == ["kept"]
"""
    outcome = run_program(program, SMALL)
    assert outcome.passed, outcome


TWICE = Program(
    "def twice(x):\n    return 2 * x\n", "def check(f):\n    assert f(3) == 6\ncheck(twice)\n", "", ("twice",)
)


def judged(solution: str, tests: str, given: str = "", entries: tuple[str, ...] = ()) -> Outcome:
    return run_program(Program(solution, tests, given, entries), SMALL)


@needs_walls
def test_a_program_and_its_tests_in_two_processes() -> None:
    assert run_program(TWICE, SMALL).passed
    wrong = run_program(replace(TWICE, solution="def twice(x): return x\n"), SMALL)
    assert wrong.reason == "AssertionError in 2"
    assert judged("x = 1", "f(2)").reason.startswith("NameError")
    assert judged("def f(:", "f(2)").reason.startswith("SyntaxError")
    assert judged("def f(): raise KeyError('k')", "try:\n  f()\nexcept KeyError: pass\nelse: assert 0").passed
    assert judged("while True: pass", "f()").reason == "timed out"
    assert judged("def f():\n  while True: pass", "f()").reason == "timed out"
    assert judged("import os\ndef f(): os.abort()", "try: f()\nexcept Exception: pass").reason == "killed by SIGABRT"
    assert judged("def f(): raise SystemExit(0)", "f()").passed is False
    assert judged("def f(): return bytearray(10**9)", "f()").reason == "MemoryError"


@needs_walls
@pytest.mark.parametrize(
    "value",
    [
        "None", "True", "-3", "10**6000", "0.1", "float('inf')", "2j", "'\\ud800 é\\n'", "b'\\xff'", "bytearray(b'a')",
        "[1, (2, {3}), frozenset({4})]", "{(1, 'a'): [None], 2.5: {}}", "range(1, 9, 2)", "Fraction(1, 3)", "int",
        "Decimal('1.10')", "deque([1, 2])", "{1: 2}.items()", "{1: 2}.keys()",
    ],
)  # fmt: skip
def test_values_cross_as_what_they_are(value: str) -> None:
    imports = "from fractions import Fraction\nfrom decimal import Decimal\nfrom collections import deque\n"
    program = f"{imports}def f(*given): return given[0] if given else {value}\n"
    tests = (
        f"{imports}import sys\nsys.set_int_max_str_digits(0)\nv = {value}\nassert f() == v and type(f()) is type(v)\n"
    )
    assert judged(program, tests).passed
    if "items" not in value and "keys" not in value:
        assert judged(program, f"{tests}assert f(v) == v and type(f(v)) is type(v)").passed


@needs_walls
def test_honest_programs_may_do_what_programs_do() -> None:
    node = "class Node:\n  def __init__(self, v): self.v, self.left = v, None\n  def twice(self): return 2 * self.v\n"
    depth = f"{node}def depth(n): return 0 if n is None else 1 + depth(n.left)\n"
    given = "root = Node(1)\nroot.left = Node(2)"
    assert judged(
        depth, "assert depth(root) == 2 and root.left.twice() == 4 and depth(root.left.left) == 0", given
    ).passed
    assert judged(
        "def f(n):\n  for i in range(n): yield i", "assert list(f(3)) == [0, 1, 2] and set(f(2)) == {0, 1}"
    ).passed
    counted = "from collections import Counter, namedtuple\nP = namedtuple('P', 'a b')\ndef f(t): return Counter(t)\n"
    assert judged(f"{counted}def g(): return P(1, 2)", "assert f('aab') == {'a': 2, 'b': 1} and g() == (1, 2)").passed
    assert judged("import enum\nclass E(enum.IntEnum):\n  A = 3\ndef f(): return E.A", "assert f() == 3").passed
    # A name that Python has, too; modules and names that the tests take for granted.
    assert judged("def sum(a, b): return a - b", "assert sum(5, 3) == 2", entries=("sum",)).passed
    assert judged("def f(x): return x ** 0.5", "assert math.isclose(f(2), 1.4142135, abs_tol=1e-5)").passed
    helper = "import math\ndef square(x): return x * x\ndef root(x):\n  '''Its root.'''\n"
    assert judged(f"{helper}  return x ** 0.5\n", "assert math.isclose(square(root(3)), 3)", helper, ("root",)).passed
    numbers = Program(
        "import numpy as np\ndef f(): return np.ones(2), np.float32(2)", "a, b = f()\nassert a.sum() == b"
    )
    assert run_program(numbers, SMALL, packages=["numpy"]).passed


ATTACKS = {
    "equal to everything": """
class E:
    __eq__ = __contains__ = __lt__ = __gt__ = __le__ = lambda self, other: True
    __ne__ = lambda self, other: False
    __hash__ = lambda self: 0
    __sub__ = __abs__ = __rsub__ = lambda self, *other: self
""",
    "a number equal to everything": """
class E(int):
    __eq__ = __lt__ = __le__ = lambda self, other: True
    __hash__ = int.__hash__
    __sub__ = __abs__ = lambda self, *other: self
""",
    "a list of everything": """
class E(list):
    __eq__ = __contains__ = lambda self, other: True
""",
    "says that it is a number": """
class E:
    __class__ = property(lambda self: int)
    __eq__ = lambda self, other: True
""",
    "frames": """
import sys
def E():
    frame = sys._getframe()
    while frame:
        if "wanted" in frame.f_locals:
            return frame.f_locals["wanted"]
        frame = frame.f_back
""",
    "objects": """
import gc
def E():
    for each in gc.get_objects():
        if isinstance(each, dict) and "wanted" in each:
            return each["wanted"]
""",
    "other mathematics": """
import builtins, math
builtins.abs = math.fabs = abs = lambda x: 0
def E():
    return 0
""",
    "no modules": """
import sys
def E():
    sys.settrace(lambda *_: None)
    sys.modules.clear()
""",
    "forged verdict": """
import os, sys
def E():
    frame, texts = sys._getframe(), []
    while frame:
        texts += [value for value in frame.f_locals.values() if isinstance(value, str)]
        frame = frame.f_back
    for handle in range(64):
        for text in texts:
            try:
                os.write(handle, b'{"token": "' + text.encode() + b'"}\\n')
            except OSError:
                pass
    os._exit(0)
""",
    "forged answers": """
import os
def E():
    for handle in range(64):
        try:
            os.write(handle, b'["value", ["object", 7]]\\n' * 9)
        except OSError:
            pass
""",
}


@needs_walls
@pytest.mark.parametrize("attack", ATTACKS)
def test_wrong_programs_do_not_pass(attack: str) -> None:
    ends = (
        "assert f(2) == wanted", "assert wanted == f(2)", "assert not f(2) != wanted", "assert wanted in f(2)",
        "assert abs(f(2) - wanted) < 1e-6", "assert math.fabs(f(2) - wanted) < 1e-6", "assert {f(2)} == {wanted}",
        "assert isinstance(f(2), int) and not f(2) != wanted", "assert [f(2)] == [wanted]",
    )  # fmt: skip
    for end in ends:
        tests = f"import math\ndef check(f):\n  wanted = 51234\n  {end}\ncheck(f)"
        assert not judged(f"{ATTACKS[attack]}\ndef f(x): return E()", tests).passed, end


@needs_walls
@pytest.mark.parametrize("wrong", ["[]", "3.5", "[3.5]", "[[3.5, 4.5]]", "float('nan')", "[3.5, 4.6]"])
def test_numbers_are_close_where_shapes_are_the_same(wrong: str) -> None:
    """As the tests of MBPP+ and HumanEval+ compare numbers; to NumPy alone, no numbers are close to all."""
    tests = """
import numpy as np
def assertion(out, exp, atol):
    if out != exp:
        assert np.allclose(out, exp, rtol=1e-07, atol=atol)
assertion(f(2), [3.5, 4.5], 1e-6)
assertion(g(2), 7.25, 1e-6)
"""
    right = "def f(x): return [3.5, 4.5 + 1e-9]\n"
    for solution, passes in (
        (f"{right}def g(x): return 7.25 - 1e-9\n", True),
        (f"def f(x): return {wrong}\ndef g(x): return 7.25\n", False),
        (f"{right}def g(x): return {wrong}\n", False),
    ):
        outcome = run_program(Program(solution, tests), Limits(patience=20), packages=["numpy"])
        assert outcome.passed is passes, outcome


# Programs that look for what their launcher will say of their end, say it themselves, and leave.
LIES = {
    "frames": """
frame = sys._getframe()
while frame:
    for value in frame.f_locals.values():
        said(value)
    frame = frame.f_back
""",
    "stacks": """
frame = sys._getframe()
while frame:
    for value in gc.get_referents(frame):
        said(value)
    frame = frame.f_back
""",
    "objects": """
for each in gc.get_objects():
    if isinstance(each, (dict, list, tuple)) and len(each) < 10:
        said(each)
""",
    "the launcher's own functions": """
write, leave = os.write, os._exit
def told(handle, text):
    frame = sys._getframe(1)
    for value in (*frame.f_locals.values(), *gc.get_referents(frame)):
        said(value)
    leave(0)
os.write = os._exit = json.dumps = told
assert False
""",
    "a jump over the end": """
frame = sys._getframe()
while frame.f_code.co_name != "main":
    frame = frame.f_back
def jump(at, what, argument):
    if at is frame and what == "line" and at.f_lineno > start:
        for line in range(start, start - 6, -1):
            try:
                at.f_lineno = line
                break
            except ValueError:
                pass
    return jump
start = frame.f_lineno
frame.f_trace = jump
sys.settrace(jump)
assert False
""",
}

SAID = """
import gc, json, os, sys
write = os.write
def said(value, deep=2):
    if isinstance(value, (dict, list, tuple)) and deep:
        for each in value.values() if isinstance(value, dict) else value:
            said(each, deep - 1)
    elif isinstance(value, str) and len(value) == 32:
        say(b'{"token": "' + value.encode() + b'"}\\n')
    elif isinstance(value, bytes) and b"token" in value:
        say(value)
def say(text):
    for handle in range(3, 12):
        try:
            write(handle, text)
        except OSError:
            pass
"""


@needs_walls
@pytest.mark.parametrize("lie", LIES)
def test_programs_do_not_find_the_word_that_says_that_they_passed(lie: str) -> None:
    assert not run(f"{SAID}{LIES[lie]}\nos._exit(0)").passed
    assert not judged(f"{SAID}{LIES[lie]}\nos._exit(0)", "f(2)").passed
    later = "\n".join(f"    {line}" for line in LIES[lie].splitlines())
    assert not judged(f"{SAID}\ndef f(x):\n{later}\n    os._exit(0)", "assert f(2) == 3").passed


@needs_walls
def test_the_process_of_a_program_with_tests_has_no_such_word() -> None:
    for tests in ("f(2)", "pass", "try:\n  f(2)\nexcept Exception:\n  pass"):
        for word in ("null", "0", '""', "[]"):
            say = f"say(b'{{\"token\": {word}}}\\n')"
            outcome = judged(f"{SAID}\ndef f(x):\n    {say}\n    os._exit(0)", tests)
            assert outcome.passed is (tests == "pass"), outcome
