"""Kernels for nbval that start at once: one process loads the large libraries, and forks for each notebook.

`kernels.py serve SOCKET` is that process. `kernels.py SOCKET CONNECTION_FILE` is what the kernel specification names:
it asks for a kernel, stays as long as that lives, hands signals on to it, and takes it along when it is killed itself.
"""
import json, os, signal, socket, sys, threading
from pathlib import Path

def specification(folder, path):
    "Write one under the name that notebooks ask for; `folder` goes into JUPYTER_PATH."
    place = Path(folder)/"kernels"/"python3"
    place.mkdir(parents=True)
    (place/"kernel.json").write_text(json.dumps({"argv": [sys.executable, __file__, str(path), "{connection_file}"], "display_name": "Python 3", "language": "python"}))

def serve(path):
    from chapters import load
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline" # as every kernel sets it before matplotlib is loaded
    load()
    sys.path.remove(str(Path(__file__).parent))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN) # nobody waits for those that end
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(path); s.listen()
        while True:
            conn, _ = s.accept()
            asked, fds, _, _ = socket.recv_fds(conn, 1<<20, 3)
            if not os.fork(): break
            conn.close()
            for f in fds: os.close(f)
    be_kernel(conn, json.loads(asked), fds)

def be_kernel(conn, asked, fds):
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for i, f in enumerate(fds): os.dup2(f, i); os.close(f)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ |= {k: v for k, v in asked["env"].items() if k != "JUPYTER_PATH"} | {"JPY_PARENT_PID": str(os.getppid())} # what a notebook starts has kernels of the usual kind
    conn.send(str(os.getpid()).encode())
    def watch(): conn.recv(1); os._exit(1) # whoever asked is gone
    threading.Thread(target=watch, daemon=True).start()
    from ipykernel.kernelapp import launch_new_instance
    launch_new_instance(argv=["-f", asked["file"]])

def ask(path, file):
    conn = socket.socket(socket.AF_UNIX)
    conn.connect(path)
    socket.send_fds(conn, [json.dumps({"file": file, "cwd": os.getcwd(), "env": dict(os.environ)}).encode()], [0, 1, 2])
    pid = int(conn.recv(32))
    for s in (signal.SIGINT, signal.SIGTERM): signal.signal(s, lambda n, _: os.kill(pid, n))
    conn.recv(1) # until it has ended

if __name__ == "__main__": serve(sys.argv[2]) if sys.argv[1] == "serve" else ask(*sys.argv[1:])
