"""Processes that begin with the large libraries already imported.

Importing torch and transformers costs four seconds of a process that then works for one. A server
imports them once and forks for every request: the command line (`codex-nb ...`), a program of
tests/programs, or a notebook's kernel. Each is a process of its own, with its own environment,
folder, signals and exit code. What depends on a fresh interpreter (PYTHONPATH, what an import does,
how much memory a process holds, signals to a launcher) is tested with real processes, and
`make prove` uses those for everything.
"""

import atexit
import gc
import importlib
import json
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIBRARIES = """numpy pandas scipy.stats matplotlib.pyplot
    torch torch._dynamo torch.distributed.fsdp safetensors.torch
    transformers.modeling_utils transformers.generation
    transformers.models.llama.modeling_llama transformers.models.gpt2.modeling_gpt2
    fastcore.test papermill.execute papermill.cli nbclient ipykernel.kernelapp ipykernel.zmqshell
    codex_nb.cli.main codex_nb.experiments.launch codex_nb.experiments.replay
    codex_nb.run.recipe codex_nb.run.judging""".split()


# --- in the new process


def close_inherited(keep):
    "Close what belongs to the process that was forked from."
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd not in keep:
            try:
                os.close(fd)
            except OSError:  # the one that listed the folder
                continue


def enter(env, cwd, fds):
    "Take over environment, folder and streams; forget the parent's signal handlers and loop."
    import asyncio

    asyncio.events._set_running_loop(None)
    asyncio.set_event_loop(None)
    signal.set_wakeup_fd(-1)
    for s in (signal.SIGTERM, signal.SIGCHLD, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(s, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for target, fd in enumerate(fds):
        os.dup2(fd, target)
    sys.stdin = open(0, closefd=False)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    if "matplotlib" in sys.modules:  # it chose its backend when it was imported
        backend = env.get("MPLBACKEND")
        sys.modules["matplotlib"].rcParams["backend"] = backend or "agg"


KERNEL_MODULES = {}


def run_kernel(connection_file, *arguments):
    sys.modules.update(KERNEL_MODULES)
    fork_workers()
    import matplotlib
    import pandas
    from ipykernel.kernelapp import IPKernelApp

    # imported in a kernel, pandas sees that it is in no terminal
    pandas.set_option("display.max_columns", 20)
    # as a kernel of its own does where nothing else is asked for
    if not os.environ.get("MPLBACKEND"):
        os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
        matplotlib.rcParams["backend"] = os.environ["MPLBACKEND"]
    app = IPKernelApp.instance(parent_handle=os.getppid())  # it ends when its parent does
    app.initialize(["-f", connection_file, *arguments])
    app.start()


class WarmSubprocess:
    "The module `subprocess` for `run_workers`: workers of codex_nb are forked by the server."

    def __getattr__(self, name):
        return getattr(subprocess, name)

    def Popen(self, command, stdout, stderr, env, start_new_session):  # noqa: N802
        ours = command[:2] == [sys.executable, "-m"] and command[2].startswith("codex_nb.")
        if not ours or not os.environ.get("WARM_SERVER") or env.get("PYTHONPATH"):
            return subprocess.Popen(
                command, stdout=stdout, stderr=stderr, env=env, start_new_session=start_new_session
            )
        return Warm(command, os.getcwd(), env, None, stdout, stderr, session=start_new_session)


def fork_workers():
    import codex_nb.train.workers

    codex_nb.train.workers.subprocess = WarmSubprocess()


def run_command(argv):
    "What `codex-nb ...`, `papermill ...`, `python -m ...` or `python FILE ...` would do."
    import runpy

    import coverage
    from jupyter_client.provisioning import local_provisioner

    if covering := coverage.Coverage.current():
        covering.stop()  # chapters in kernels are what is counted: commands would become slow
    local_provisioner.launch_kernel = fork_kernel
    fork_workers()
    for loaded in [m for m in sys.modules if m.partition(".")[0] == "ipykernel"]:
        KERNEL_MODULES[loaded] = sys.modules.pop(loaded)  # it is not in a notebook
    program, *words = [word for word in argv if word != "-u"]  # streams are what `enter` made them
    name = Path(program).name
    sys.argv = [program, *words]
    if name == "codex-nb":
        from codex_nb.cli.main import main

        return main()
    if name == "papermill":
        from papermill.cli import papermill

        return papermill()
    if words[0] == "-m":
        sys.argv = [words[1], *words[2:]]
        sys.modules.pop(words[1], None)
        return runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).parent))
    return runpy.run_path(words[0], run_name="__main__")


def finish(function, *arguments):
    "Run to the end and leave, with the exit code that Python itself would leave with."
    import traceback

    code = 0
    try:
        function(*arguments)
    except SystemExit as e:
        code = e.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        import threading

        threading._shutdown()  # as any program, wait for the threads that are no daemons
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    finally:
        os._exit(code or 0)


class Forked:
    "A child of this process that looks like `subprocess.Popen`."

    stdin = stdout = stderr = None

    def __init__(self, pid):
        self.pid, self.returncode = pid, None

    def poll(self):
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                pid, status = self.pid, 0
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout=None):
        end = time.monotonic() + (timeout or 3600)
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("forked", timeout)
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def fork(session):
    "Fork; in the parent, return when the child is the leader of its session, should it become one."
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        os.read(reading, 1)
        os.close(reading)
        return pid
    if session:
        os.setsid()
    os.close(writing)
    os.close(reading)
    return 0


def fork_kernel(cmd, stdin=None, stdout=None, stderr=None, env=None, cwd=None, **more):
    "As `jupyter_client.launcher.launch_kernel`, by a fork of this process."
    arguments = [str(w) for w in cmd[cmd.index("-f") + 1 :]]
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := fork(session=True):  # its process group is interrupted, which must not be this one
        return Forked(pid)
    null = os.open(os.devnull, os.O_RDWR)
    out = stdout.fileno() if hasattr(stdout, "fileno") else 1
    err = stderr.fileno() if hasattr(stderr, "fileno") else 2
    enter(dict(env or os.environ), cwd or os.getcwd(), [null, os.dup(out), os.dup(err)])
    close_inherited(())
    finish(run_kernel, *arguments)


# --- the server


def serve(path):
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # or each collection in a child would copy all that is here
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those who forked wait for theirs
    owner = os.getppid()
    listener.settimeout(5)
    while True:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            if os.getppid() != owner:
                return
            continue
        if os.fork():
            connection.close()
            continue
        listener.close()
        attend(connection)


def attend(connection):
    "One request: fork for it, say which process it is, and with which code it ended."
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    connection.settimeout(None)
    size, fds, _, _ = socket.recv_fds(connection, 8, 3)
    text = b""
    while len(text) < int(size, 16):
        text += connection.recv(1 << 20)
    request = json.loads(text)
    pid = fork(request["session"])
    if pid == 0:
        enter(request["env"], request["cwd"], fds)
        close_inherited(())
        if request["kernel"]:
            finish(run_kernel, *request["argv"])
        finish(run_command, request["argv"])
    for fd in fds:
        os.close(fd)
    try:
        connection.sendall(b"%d\n" % pid)
        status = wait_for(pid, connection)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        connection.sendall(b"%d %.2f\n" % (status, used.ru_utime + used.ru_stime))
    finally:
        os._exit(0)


def wait_for(pid, connection):
    "Wait for a process to end; kill it when the one that asked for it is gone."
    ended = os.pidfd_open(pid)
    while True:
        ready, _, _ = select.select([ended, connection], [], [])
        if connection in ready and ended not in ready and connection.recv(1) == b"":
            os.kill(pid, signal.SIGKILL)
        if ended in ready:
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# --- for tests


def start_server():
    "Start the server, and return at once; its place is in the environment, for others."
    folder = tempfile.mkdtemp(prefix="warm-")
    os.environ["WARM_SERVER"] = f"{folder}/socket"
    # the last word lets `codex-nb` recognise a kernel by its command line
    process = subprocess.Popen(
        [sys.executable, __file__, os.environ["WARM_SERVER"], "ipykernel_launcher"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
    )

    def stop():
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(stop)


def server():
    "The place of the server, which is started when it is first asked for."
    if not os.environ.get("WARM_SERVER"):
        start_server()
    end = time.monotonic() + 300
    while not os.path.exists(os.environ["WARM_SERVER"]):
        assert time.monotonic() < end, "the server of warm processes did not start"
        time.sleep(0.05)
    return os.environ["WARM_SERVER"]


def connect(connection):
    for _ in range(100):
        try:
            return connection.connect(server())
        except (ConnectionRefusedError, BlockingIOError):  # it has just begun, or has much to do
            time.sleep(0.1)
    raise ConnectionError("the server of warm processes does not answer")


class Warm(Forked):
    "A process of the server; looks like `subprocess.Popen`."

    def __init__(
        self,
        argv,
        cwd,
        env,
        stdin=None,
        stdout=None,
        stderr=None,
        kernel=False,
        session=False,
    ):
        null = os.open(os.devnull, os.O_RDWR)
        streams = [s.fileno() if s else null for s in (stdin, stdout, stderr)]
        request = {
            "argv": [*map(str, argv)],
            "cwd": str(cwd),
            "env": dict(env),
            "kernel": kernel,
            "session": session,
        }
        text = json.dumps(request).encode()
        self.connection = socket.socket(socket.AF_UNIX)
        connect(self.connection)
        socket.send_fds(self.connection, [b"%08x" % len(text)], streams)
        self.connection.sendall(text)
        self.lines = self.connection.makefile("r")
        super().__init__(int(self.lines.readline()))
        os.close(null)

    def poll(self):
        if self.returncode is None:
            self.connection.setblocking(False)
            try:
                if self.connection.recv(1, socket.MSG_PEEK) == b"":
                    self.returncode = -9  # the server is gone
            except BlockingIOError:
                return None
            finally:
                self.connection.setblocking(True)
            if self.returncode is None:
                code, self.seconds = self.lines.readline().split()
                self.returncode = int(code)
        return self.returncode


def launch_kernel(cmd, stdin=None, stdout=None, stderr=None, env=None, cwd=None, **more):
    "As `jupyter_client.launcher.launch_kernel`, by the server."
    arguments = cmd[cmd.index("-f") + 1 :]
    environment = dict(env or os.environ)
    return Warm(arguments, cwd or os.getcwd(), environment, kernel=True, session=True)


def run(argv, cwd, env, input=None, timeout=600, **more):
    "As `subprocess.run(..., capture_output=True, text=True)`."
    temporary = tempfile.TemporaryFile
    with temporary("w+") as out, temporary("w+") as err, temporary("w+") as given:
        given.write(input or "")
        given.seek(0)
        process = Warm(argv, cwd, env, given, out, err, **more)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(argv, process.returncode, out.read(), err.read())


if __name__ == "__main__":
    serve(sys.argv[1])
