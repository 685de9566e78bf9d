"""The wheel, with the runtime dependencies alone and no repository at hand, imports, trains, and executes its run again."""
import json, os, re, shutil, subprocess, sys, venv, zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent

def closure(name, extras=()):
    "Names of the installed distributions that `name` needs at run time."
    found, todo = {}, [(name, tuple(extras))]
    while todo:
        n, ex = todo.pop()
        key = re.sub(r"[-_.]+", "-", n).lower()
        if (key, ex) in found: continue
        try: d = distribution(n)
        except PackageNotFoundError: continue
        found[key, ex] = d
        for r in map(Requirement, d.requires or []):
            if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in ("", *ex)): todo.append((r.name, tuple(sorted(r.extras))))
    return {k: d for (k, _), d in found.items()}

def test_runtime_dependencies_suffice(tmp_path):
    needed = closure("codex_nb")
    assert {"torch", "transformers", "papermill"} <= needed.keys()
    assert not {"nbdev", "fastcore", "mlflow", "pytest", "jupyterlab", "nbconvert"} & needed.keys()
    venv.create(tmp_path/"env", with_pip=False, symlinks=True)
    python = tmp_path/"env"/"bin"/"python"
    site = Path(subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True, check=True).stdout.strip())
    for name, d in needed.items():
        if name == "codex-nb": continue
        tops = {Path(f).parts[0] for f in d.files or [] if not str(f).startswith("..")} - {"__pycache__"}
        for t in tops:
            if (d.locate_file("")/t).exists() and not (site/t).exists(): (site/t).symlink_to(d.locate_file("")/t)
        for f in d.files or []:
            if "share/jupyter/kernels" in str(f):
                to = tmp_path/"env"/str(f).lstrip("./"); to.parent.mkdir(parents=True, exist_ok=True)
                if not to.exists(): to.symlink_to(Path(d.locate_file(f)).resolve())
    source = tmp_path/"source"
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(".*", "_docs", "_proc", "build", "runs", "store", "*.egg-info", "__pycache__"))
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source], check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as z: z.extractall(site)
    shutil.rmtree(source)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("COV", "PYTHON", "VIRTUAL"))} | {"CODEX_NB_HOME": str(tmp_path/"home"), "PATH": f"{python.parent}:/usr/bin:/bin"}
    modules = [p.stem for p in (ROOT/"codex_nb").glob("*.py") if not p.stem.startswith("_")]
    code = "import importlib, sys\nfor m in sys.argv[1:]: importlib.import_module('codex_nb.'+m)\nfor m in ('nbdev', 'fastcore', 'mlflow', 'pytest'):\n    try: importlib.import_module(m)\n    except ImportError: continue\n    sys.exit(f'{m} is here')"
    done = subprocess.run([python, "-c", code, *modules], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    words = "run train -p steps 3 -p width 32 -p batch_size 2 -p eval_documents 1 -p max_documents 4 -p max_new_tokens 4 -p resamples 100 -p sinks mlflow".split()
    done = subprocess.run([python, "-c", "from codex_nb.cli import main; main()", *words], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stdout+done.stderr
    folder, = (tmp_path/"home"/"runs").iterdir()
    assert "finished: " in done.stdout and (folder/"manifest.json").is_file()
    again = subprocess.run([python, "-c", "from codex_nb.cli import main; main()", "replay", str(folder), "--quiet"], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert again.returncode == 0 and "proven: L3" in again.stdout, again.stdout+again.stderr
    said = (folder/"train.ipynb").read_text()
    assert "mlflow is left out from here on" in said and "pip install 'codex_nb[mlflow]'" in said # said, by name, with the remedy; and the run went on
    audit = subprocess.run([python, "-c", "from codex_nb.cli import main; main()", "audit", "--json"], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert audit.returncode == 0 and len(json.loads(audit.stdout)["rows"]) == 50 and json.loads(audit.stdout)["stubs"] == [], audit.stderr
