"""The image: its file is linted, its steps are executed in a clean root without rights."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import PROGRAMS, PROVE, ROOT

sys.path.insert(0, str(ROOT / "tools"))
DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
LINES = [line for line in DOCKERFILE.splitlines() if line and not line.startswith("#")]


def test_hadolint_finds_nothing():
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not hadolint:
        pytest.skip("no hadolint here")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "", done.stdout
    bad = subprocess.run(
        [hadolint, "-"],
        input="FROM python\nRUN cd /x && sudo pip install y\n",
        capture_output=True,
        text=True,
    )
    assert bad.returncode == 1


def test_what_the_image_copies_is_there_and_sent_along():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    sent = [line[1:] for line in ignored if line.startswith("!")]
    copied = [line for line in LINES if line.startswith("COPY") and "--from" not in line]
    sources = [word for line in copied for word in line.split()[1:-1]]
    assert {"codex_nb", "data", "nbs", "pyproject.toml"} <= set(sources)
    for s in sources:
        assert (ROOT / s).exists() and any(s == x or s.startswith(x + "/") for x in sent), s
    assert any(line.startswith("USER ") for line in LINES)
    assert {'ENTRYPOINT ["codex-nb"]', 'CMD ["--help"]', "VOLUME /workspace"} <= set(LINES)
    for p in sorted((ROOT / "docker").glob("*.sh")):
        assert subprocess.run(["sh", "-n", p]).returncode == 0 and os.access(p, os.X_OK)


def test_services_listen_on_the_loopback_interface_alone():
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    assert {"lab", "mlflow"} <= services.keys()
    for name, s in services.items():
        assert all(p.startswith("127.0.0.1:") for p in s.get("ports", [])), name
        assert s["volumes"] == ["workspace:/workspace"] and s["cap_drop"] == ["ALL"], name
    assert ":?" in services["lab"]["environment"]["JUPYTER_TOKEN"]  # refused without one


def test_the_image_lock_is_part_of_the_lock():
    import lock

    names = {r.name for r, _ in lock.locked(lock.IMAGE_LOCK.read_text())}
    assert {"jupyterlab", "mlflow", "peft", "transformers"} <= names and not {
        "nbdev",
        "pytest",
        "hypothesis",
        "torch",
    } & names


def test_the_cuda_that_is_named_has_wheels_of_this_torch():
    "A new torch brings a new list, and leaves out older versions of CUDA."
    import lock

    assert lock.TORCH.startswith("2.13.")  # the list below is of this one
    texts = [(ROOT / "Dockerfile").read_text(), (ROOT / "docker" / "install.sh").read_text()]
    named = {name for text in texts for name in re.findall(r"\bcu1\d\d\b", text)}
    assert named and named <= set(lock.TORCH_CUDA)


def root_of(folder):
    "A minimal system with Python, made by debootstrap; None says why not."
    if not shutil.which("debootstrap") or os.geteuid():
        return None
    done = subprocess.run(
        [
            "debootstrap",
            "--variant=minbase",
            "--include=python3-venv",
            "bookworm",
            folder,
            "http://deb.debian.org/debian",
        ],
        capture_output=True,
        text=True,
    )
    return folder if done.returncode == 0 else None


@pytest.mark.skipif(not PROVE, reason="several minutes; make prove")
def test_image_steps_work_in_a_clean_root(tmp_path):
    import lock

    root = root_of(tmp_path / "root")
    if root is None:
        pytest.skip("no debootstrap here, or no right to use it")
    wheels = root / "wheels"
    there = subprocess.run(
        ["chroot", root, "python3", "-c", "import platform; print(platform.python_version())"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()  # often an older one than here
    wanted = [
        (r, h)
        for r, h in lock.locked(lock.IMAGE_LOCK.read_text())
        if r.marker is None
        or r.marker.evaluate(
            {"python_full_version": there, "python_version": there.rpartition(".")[0]}
        )
    ]
    (tmp_path / "wanted.txt").write_text(
        "".join(
            f"{r.name}{r.specifier}" + "".join(f" --hash=sha256:{x}" for x in h) + "\n"
            for r, h in wanted
        )
    )
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-qq",
            "--no-deps",
            "--require-hashes",
            "-d",
            wheels,
            "-r",
            tmp_path / "wanted.txt",
        ],
        check=True,
    )
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-qq",
            "--no-deps",
            "-d",
            wheels,
            f"torch=={lock.TORCH}",
        ],
        check=True,
    )
    (root / "src").mkdir()
    for p in (
        "codex_nb",
        "data",
        "nbs",
        "docker",
        "tools",
        "pyproject.toml",
        "README.md",
        "LICENSE",
    ):
        if (ROOT / p).is_dir():
            shutil.copytree(
                ROOT / p,
                root / "src" / p,
                symlinks=True,
                ignore=shutil.ignore_patterns("__pycache__"),
            )
        else:
            shutil.copyfile(ROOT / p, root / "src" / p)
    (root / "workspace").mkdir()
    os.chown(root / "workspace", 1000, 1000)

    def inside(*words, user="0:0", check=True, **env):
        script = " && ".join(
            [
                f'mount --rbind /proc "{root}/proc"',
                f'mount --rbind /dev "{root}/dev"',
                f'mount -t tmpfs tmpfs "{root}/tmp"',
                'exec "$@"',
            ]
        )
        given = {
            "PATH": "/opt/codex-nb/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/tmp",
            "CODEX_NB_HOME": "/workspace",
        } | env
        done = subprocess.run(
            [
                "unshare",
                "--mount",
                "--net",
                "sh",
                "-c",
                script,
                "sh",
                sys.executable,
                PROGRAMS / "loopback_up.py",
                "chroot",
                f"--userspec={user}",
                root,
                "env",
                "-i",
                *(f"{k}={v}" for k, v in given.items()),
                "sh",
                "-c",
                'cd /workspace && exec "$@"',
                "sh",
                *words,
            ],
            capture_output=True,
            text=True,
        )
        assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        return done

    index = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/wheels"}
    inside("/src/docker/install.sh", "/opt/codex-nb", TORCH_BACKEND="pip", **index)
    inside("/src/docker/package.sh", "/opt/codex-nb", **index)
    shutil.copy(
        root / "src" / "docker" / "lab.sh", root / "opt" / "codex-nb" / "bin" / "codex-nb-lab"
    )
    shutil.rmtree(root / "src")
    shutil.rmtree(wheels)

    def user(*words, **more):
        return inside(*words, user="1000:1000", **more)

    assert "Usage: codex-nb" in user("codex-nb", "--help").stdout
    user("codex-nb", "doctor", "--quick")
    assert "finished: " in user("codex-nb", "run", "train", "-p", "preset", "smoke").stdout
    (run,) = (root / "workspace" / "runs").iterdir()
    assert run.stat().st_uid == 1000 and "L0 holds" in user("codex-nb", "verify", run.name).stdout
    assert "JUPYTER_TOKEN" in user("codex-nb-lab", check=False).stderr
    started = user(
        "timeout", "-s", "INT", "12", "codex-nb-lab", check=False, JUPYTER_TOKEN="t" * 20
    )
    assert (
        "is running at" in started.stderr and (root / "workspace" / "nbs" / "train.ipynb").is_file()
    ), started.stderr[-2000:]
    assert user("touch", "/opt/codex-nb/x", check=False).returncode != 0
