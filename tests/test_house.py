"""The house is in order: generated files are current, imports go downward, nothing is banned."""

import ast
import configparser
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from helpers import BIN, LIB, NBS, PROGRAMS, ROOT

CHAPTERS = sorted(NBS.rglob("[0-9][0-9]_*.ipynb"), key=lambda p: p.name)
NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
MODULES = sorted(p for p in LIB.rglob("*.py") if not p.name.startswith("_"))


def page(notebook):
    return notebook.relative_to(NBS).as_posix()


def cells(notebook):
    return json.loads(notebook.read_text())["cells"]


def code(notebook):
    return ["".join(c["source"]) for c in cells(notebook) if c["cell_type"] == "code"]


def module_of(chapter):
    return next(
        m[1] for s in code(chapter) if (m := re.search(r"^#\|\s*default_exp ([\w.]+)", s, re.M))
    )


def tracked():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [ROOT / p for p in listed.stdout.splitlines() if (ROOT / p).is_file()]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    to = tmp_path_factory.mktemp("copy") / "codex_nb"
    shutil.copytree(
        ROOT,
        to,
        symlinks=True,
        ignore=shutil.ignore_patterns(
            ".venv",
            ".git",
            "runs",
            "store",
            ".ci-logs",
            "*.egg-info",
            "__pycache__",
            ".coverage*",
            ".hypothesis",
            ".mypy_cache",
            ".ruff_cache",
        ),
    )
    return to


def files(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_text()
        for p in sorted(folder.rglob("*.*"))
        if p.suffix in (".py", ".ipynb")
        and p.is_file()
        and not {".ipynb_checkpoints", "__pycache__"} & set(p.parts)
    }


def test_modules_are_in_step_with_notebooks(copy):
    for p in (copy / "codex_nb").rglob("*.py"):
        if p.name != "__init__.py":
            p.unlink()
    words = [sys.executable, "tools/export.py"]
    subprocess.run(words, cwd=copy, check=True, capture_output=True)
    assert files(copy / "codex_nb") == files(LIB)


def test_notebooks_are_clean(copy):
    subprocess.run([BIN / "nbdev_clean"], cwd=copy, check=True, capture_output=True)
    assert files(copy / "nbs") == files(NBS)


def test_no_stored_output_is_an_error():
    assert not [
        (p.name, o["ename"])
        for p in NOTEBOOKS
        for c in cells(p)
        for o in c.get("outputs", [])
        if o["output_type"] == "error"
    ]


def missing_tables(cells):
    "Cells that end in a table, and show none."
    return [
        s
        for c in cells
        if c["cell_type"] == "code" and not c["outputs"]
        for s in ["".join(c["source"])]
        if re.search(r"(?m)^(?:pd\.DataFrame\(|\w+\.style)[^\n]*(?:\n {4}[^\n]*)*\s*\Z", s)
        and not re.search(r"#\|\s*(?:slow|cuda|eval:\s*false)", s)
    ]


def test_every_table_is_stored():
    cell = {
        "cell_type": "code",
        "source": ["x = 1\n", "pd.DataFrame([x,\n", "    2]).style.hide()"],
        "outputs": [],
    }
    assert missing_tables([cell]) and not missing_tables([cell | {"outputs": [{}]}])
    assert not [(p.name, s[:60]) for p in NOTEBOOKS for s in missing_tables(cells(p))]


def imports_of(tree, package="codex_nb"):
    "Absolute names of the modules that are imported, each with what is taken from it."
    for n in ast.walk(tree):
        if isinstance(n, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - n.level + 1] if n.level else []
            yield ".".join([*above, *filter(None, [n.module])]), [a.name for a in n.names]
        elif isinstance(n, ast.Import):
            yield from ((a.name, []) for a in n.names)


def source_of(module):
    return LIB / f"{module.replace('.', '/')}.py"


def test_chapters_import_only_from_below():
    place = {module_of(p): i for i, p in enumerate(CHAPTERS)}  # as they are read
    seen = 0
    for p in CHAPTERS:
        own = module_of(p)
        assert own == f"{p.parent.name}.{p.stem[3:]}", f"{p} is not where its module is"
        for module, names in imports_of(
            ast.parse(source_of(own).read_text()), f"codex_nb.{own.rpartition('.')[0]}"
        ):
            inside = module.removeprefix("codex_nb.")
            for m in (
                [inside]
                if inside in place
                else [f"{inside}.{n}" for n in names]
                if module.startswith("codex_nb.")
                else names
                if module == "codex_nb"
                else []
            ):
                assert m in place, f"{p.name} imports codex_nb.{m}, which is no chapter"
                assert place[m] < place[own], f"{p.name} imports {m}, which is not below it"
                seen += 1
    assert seen > 50


def test_every_module_is_a_chapter():
    assert {".".join(p.relative_to(LIB).with_suffix("").parts) for p in MODULES} == {
        module_of(p) for p in CHAPTERS
    }


BANNED_CALLS = {
    "torch.load",
    "pickle.load",
    "pickle.loads",
    "eval",
    "exec",
    "os.system",
    "yaml.load",
    "yaml.unsafe_load",
}


def dotted(n):
    return (
        f"{dotted(n.value)}.{n.attr}"
        if isinstance(n, ast.Attribute)
        else n.id
        if isinstance(n, ast.Name)
        else "?"
    )


def forbidden(source):
    found = []
    for n in ast.walk(ast.parse(source)):
        if isinstance(n, ast.Call):
            name = dotted(n.func)
            if name in BANNED_CALLS or name.endswith((".extractall", ".unpack_archive")):
                found.append(name)
            for k in n.keywords:
                if k.arg == "trust_remote_code" and not (
                    isinstance(k.value, ast.Constant) and k.value.value is False
                ):
                    found.append("trust_remote_code")
                if k.arg == "shell" and not (
                    isinstance(k.value, ast.Constant) and k.value.value is False
                ):
                    found.append("shell")
        if isinstance(n, ast.ExceptHandler) and all(isinstance(b, ast.Pass) for b in n.body):
            found.append("except: pass")
    return found + [
        m
        for m, _ in imports_of(ast.parse(source))
        if m.split(".")[0] in ("pickle", "dill", "joblib", "nbdev", "fastcore", "execnb")
    ]


def test_nothing_forbidden_in_the_package():
    assert not {p.name: f for p in MODULES if (f := forbidden(p.read_text()))}


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load('x')",
        "from pickle import load",
        "f(trust_remote_code=True)",
        "t.extractall()",
        "try: f()\nexcept E: pass",
        "import fastcore.test",
    ],
)
def test_banned_calls_are_found(source):
    assert forbidden(source)


@functools.cache
def bound_in(module):
    "Names that a module of the package binds; of a package, its modules."
    if not source_of(module).is_file():
        folder = LIB / module.replace(".", "/")
        return {f.stem for f in folder.glob("*.py")} | bound_in(f"{module}.__init__")
    names = set()
    for n in ast.walk(ast.parse(source_of(module).read_text())):
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)):
            names.add(n.name)
        elif isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store):
            names.add(n.id)
        elif isinstance(n, (ast.Import, ast.ImportFrom)):
            names.update(a.asname or a.name for a in n.names)
    return names


def test_what_programs_take_from_the_package_is_there():
    "Also in the strings that a benchmark hands to another process, which no other check reads."
    sources = {p: "\n".join(code(p)) for p in NOTEBOOKS}
    for folder in ("tests", "tools"):
        sources |= {p: p.read_text() for p in (LIB.parent / folder).rglob("*.py")}
    wrong, seen = [], 0
    for p, source in sources.items():
        for found in re.finditer(IMPORT, source):
            module, listed = found[1], re.sub("#.*", "", found[2])
            names = re.findall(r"\w+(?: as \w+)?", listed)
            unknown = {n.partition(" as ")[0] for n in names} - bound_in(module)
            wrong += [f"{p.name}: {module}.{n}" for n in unknown]
            seen += len(names)
    assert seen > 1000 and not wrong


IMPORT = re.compile(r"^ *from codex_nb\.([\w.]+) import +(\([^)]*\)|[^\n#(]+)", re.M)


def test_import_has_no_side_effects(tmp_path):
    # packages below set variables when they are imported: these are theirs, not ours
    env = {k: v for k, v in os.environ.items() if not k.startswith("COV")}
    modules = json.dumps([module_of(p) for p in CHAPTERS])
    done = subprocess.run(
        [sys.executable, PROGRAMS / "import_quietly.py", modules],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_importing_the_package_is_light():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, codex_nb, codex_nb.cli.main, codex_nb.run.run_folder\n"
            "import codex_nb.model.model_config, codex_nb.model.model_registry\n"
            "import codex_nb.tracking.sinks, codex_nb.tracking.system_monitor\n"
            "heavy = ('torch', 'transformers', 'peft', 'pandas', 'matplotlib', 'mlflow')\n"
            "print([m for m in (*heavy, 'papermill') if m in sys.modules])",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_run_notebooks_have_a_parameters_cell():
    from codex_nb.core.config import flat_names
    from codex_nb.experiments.launch import settings_class

    for name in ("train", "finetune", "prefer", "distill", "evaluate", "compare"):
        tagged = [
            c for c in cells(NBS / f"{name}.ipynb") if "parameters" in c["metadata"].get("tags", [])
        ]
        assert len(tagged) == 1, name
        names = [t.id for n in ast.parse("".join(tagged[0]["source"])).body for t in n.targets]
        assert names[0] == "preset" and set(names) <= {
            *flat_names(settings_class(NBS / f"{name}.ipynb")),
            "preset",
        }


def test_readme_is_current(tmp_path):
    subprocess.run(
        [sys.executable, ROOT / "tools" / "readme.py", tmp_path], check=True, capture_output=True
    )
    assert (tmp_path / "README.md").read_text() == (ROOT / "README.md").read_text(), (
        "run `make readme`"
    )


def front_text():
    "The README and the guides."
    guides = [s for p in sorted((NBS / "guides").glob("*.ipynb")) for s in prose(p)]
    return "\n\n".join([(ROOT / "README.md").read_text(), *guides])


def prose(notebook):
    return ["".join(c["source"]) for c in cells(notebook) if c["cell_type"] == "markdown"]


def commands_in(text):
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    quoted = re.findall(r"`((?:make|codex-nb|papermill|mlflow) [^`]+)`", text)
    return [line for line in lines if line] + quoted


def test_every_command_of_the_readme_exists():
    found = commands_in(front_text())
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    from codex_nb.cli.main import app
    from codex_nb.core.config import flat_names
    from codex_nb.experiments.launch import settings_class

    known = {c.callback.__name__.replace("_", "-") for c in app.registered_commands} | {
        g.name for g in app.registered_groups
    }
    for c in found:
        words = c.split()
        assert shutil.which(words[0], path=f"{BIN}:{os.environ['PATH']}"), c
        if words[0] == "make":
            assert words[1] in targets, c
        if words[0] == "codex-nb":
            assert words[1] in known, c
        if words[0] == "papermill":
            assert (ROOT / words[1]).is_file(), c
        if words[0] == "mlflow":
            assert words[1] == "ui", c
        if words[:2] == ["codex-nb", "run"] and len(words) > 2 or words[0] == "papermill":
            nb = NBS / (words[2] + ".ipynb") if words[0] == "codex-nb" else ROOT / words[1]
            assert nb.is_file() and {words[i + 1] for i, w in enumerate(words) if w == "-p"} <= {
                *flat_names(settings_class(nb)),
                "preset",
            }, c
    assert len(found) > 10


def test_links_and_extras_of_the_readme_are_right():
    from codex_nb.deploy.doctor import EXTRAS

    text = (ROOT / "README.md").read_text()
    words = len(re.sub(r"```.*?```|\]\([^)]*\)", "", text, flags=re.S).split())
    assert 400 < words < 1000, "the front door is short: everything else is a page of its own"
    links = re.findall(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", text)
    for bang, alt, link in links:
        assert link.startswith("http") or (ROOT / link.partition("#")[0]).exists() and alt, link
    assert len(links) > 25 and any(bang for bang, *_ in links)
    text = front_text()
    table = dict(re.findall(r"^\| `pip install 'codex_nb\[([\w-]+)\]'` \| (.*?) \|", text, re.M))
    assert table == dict(EXTRAS.values())
    source = "".join(p.read_text() for p in MODULES)
    row = r"^\| `pip install 'codex_nb\[(?!lab)[^|]*\|[^|]*\| (.*?) \|$"
    for message in re.findall(row, text, re.M):
        assert message in source, message


def test_list_of_chapters_names_every_one():
    text = front_text().partition("## The chapters")[2].partition("\n# ")[0]
    assert re.findall(r"`(\d\d_\w+)`", text) == [p.stem for p in CHAPTERS]
    assert set(re.findall(r"`([a-z_]+)`", text)) >= {p.stem for p in NBS.glob("[a-z]*.ipynb")} - {
        "index"
    }


def test_make_help_lists_every_target():
    listed = subprocess.run(
        ["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    phony = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
    targets = " ".join(phony).split()
    assert {"train", "test", "prove", "release"} <= set(targets)
    for t in targets:
        assert f"make {t} " in listed, t


def test_environment_variables_are_known():
    from codex_nb.core.config import ENVIRONMENT

    used = {m for p in MODULES for m in re.findall(r"CODEX_NB_[A-Z]+", p.read_text())}
    assert used <= set(ENVIRONMENT)
    read = {m for p in MODULES for m in re.findall(r"env_setting\(\"(\w+)\"\)", p.read_text())}
    assert read == set(ENVIRONMENT), "a variable is listed that nothing reads"


def faults_of_page(p, cells):
    """What is wrong with a page, such as dead links, missing pictures, jumps between headings.

    Also pictures that a reader who does not see them learns nothing from.
    """
    text = [
        re.sub(r"```.*?```", "", "".join(c["source"]), flags=re.S)
        for c in cells
        if c["cell_type"] == "markdown"
    ]
    levels = [len(m[1]) for t in text for m in re.finditer(r"^(#+) ", t, re.M)]
    if levels[:1] != [1] or levels.count(1) != 1:
        yield "must have one title, first"
    if any(b > a + 1 for a, b in zip(levels, levels[1:])):
        yield "jumps between headings"
    for t in text:
        for bang, alt, link in re.findall(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", t):
            there, _, anchor = link.partition("#")
            target = p.parent / there if there else p
            if bang and not alt:
                yield f"{link}: no alternative text"
            if bang and link.startswith("http"):
                yield f"{link}: a picture from elsewhere"
            if link.startswith("http"):
                continue
            if not target.exists():
                yield f"{link}: not there"
            elif (
                anchor
                and target.suffix == ".ipynb"
                and anchor
                not in {
                    re.sub(r"[^\w\s-]", "", h.lower()).strip().replace(" ", "-")
                    for c in json.loads(target.read_text())["cells"]
                    if c["cell_type"] == "markdown"
                    for h in re.findall(r"^#+ (.*)$", "".join(c["source"]), re.M)
                }
            ):
                yield f"{link}: no such heading"
    for c in cells:
        if any(
            k.startswith("image/") for o in c.get("outputs", []) for k in o.get("data", {})
        ) and not re.search(r"^#\| fig-alt: \S", "".join(c["source"]), re.M):
            yield f"cell {c['id']}: a picture without alternative text (#| fig-alt)"


def test_links_of_notebooks_live():
    links = pictures = 0
    for p in NOTEBOOKS:
        found = cells(p)
        assert not (wrong := list(faults_of_page(p, found))), (page(p), wrong)
        for c in found:
            if c["cell_type"] == "markdown":
                links += len(re.findall(r"\]\([^)\s]+\)", "".join(c["source"])))
            kinds = [k for o in c.get("outputs", []) for k in o.get("data", {})]
            pictures += sum(k.startswith("image/") for k in kinds)
    assert links > 500 and pictures > 20


@pytest.mark.parametrize(
    "cells, what",
    [
        ([("markdown", "## A")], "one title"),
        ([("markdown", "# A"), ("markdown", "### B")], "jumps"),
        ([("markdown", "# A\n[x](nonesuch.ipynb)")], "not there"),
        ([("markdown", "# A\n[x](index.ipynb#nonesuch)")], "no such heading"),
        ([("markdown", "# A\n![](logo.svg)")], "no alternative text"),
        ([("markdown", "# A"), ("code", "plot()")], "fig-alt"),
    ],
)
def test_faults_of_pages_are_found(cells, what):
    made = [
        {
            "cell_type": kind,
            "id": "x",
            "source": source,
            "outputs": [{"data": {"image/png": ""}}] if kind == "code" else [],
        }
        for kind, source in cells
    ]
    found = list(faults_of_page(NBS / "x.ipynb", made))
    assert len(found) == 1 and what in found[0]


def test_data_is_small_and_as_its_card_says():
    for p in (ROOT / "data").glob("*.jsonl"):
        card = p.with_suffix(".md").read_text()
        assert p.stat().st_size < 2 << 20 and hashlib.sha256(p.read_bytes()).hexdigest() in card


def test_every_claim_names_what_is_there():
    "What the audit points to exists, and every chapter that exports stands behind a claim."
    from codex_nb.deploy.audit import load_claims

    tests = {
        f"tests/{p.name}": {
            n.name for n in ast.parse(p.read_text()).body if isinstance(n, ast.FunctionDef)
        }
        for p in (ROOT / "tests").glob("test_*.py")
    }
    named = {s for c in load_claims() for s in c.shown_by if not s.startswith("doctor:")}
    on_gpu = {s.removeprefix("cuda:") for s in named if s.startswith("cuda:")}
    checks = re.findall(r"^def (\w+)\(args", (ROOT / "tools" / "cuda.py").read_text(), re.M)
    assert on_gpu - {"several_gpus"} <= set(checks)  # there is no such check yet, and no such proof
    named = {s for s in named if not s.startswith("cuda:")}
    for s in named:
        if s.startswith("nbs/"):
            assert (ROOT / s).is_file(), s
        else:
            assert (
                s.partition("::")[0] in tests
                and (s.partition("::")[2] or next(iter(tests[s.partition("::")[0]])))
                in tests[s.partition("::")[0]]
            ), s
    assert {module_of(p) for p in CHAPTERS} == {m for c in load_claims() for m in c.modules}
    assert {s.partition("::")[0] for s in named if s.startswith("tests/")} | {
        "tests/test_lab.py"
    } == tests.keys()  # the lab's test is skipped where there is no browser


def test_version_is_that_of_settings_ini():
    import codex_nb

    ini = configparser.ConfigParser()
    ini.read(ROOT / "settings.ini")
    assert codex_nb.__version__ == ini["DEFAULT"]["version"]


def test_no_secrets_in_tracked_files():
    from detect_secrets.core.scan import scan_line
    from detect_secrets.settings import transient_settings

    from codex_nb.core.safety import find_secrets

    names = """Artifactory AWSKey AzureStorageKey BasicAuth Cloudant DiscordBotToken GitHubToken
        GitLabToken IbmCloudIam JwtToken Mailchimp Npm OpenAI PrivateKey PypiToken SendGrid Slack
        Stripe TwilioKey""".split()

    def scan(text):
        with transient_settings({"plugins_used": [{"name": f"{n}Detector"} for n in names]}):
            found = [s.type for line in text.splitlines() for s in scan_line(line)]
        return found + [f.kind for f in find_secrets(text, {})]

    assert scan("key = " + "AKIA" + "ABCDEFGHIJKLMNOP")
    found = {}
    for p in tracked():
        if p.suffix in (".lock", ".png", ".xz"):
            continue
        text = p.read_text(errors="replace")
        if p.suffix == ".ipynb":
            text = "\n".join(
                "".join(c["source"]) + "\n" + json.dumps(c.get("outputs", ""), ensure_ascii=False)
                for c in cells(p)
                for c in [
                    c
                    | {
                        "outputs": [
                            o for o in c.get("outputs", []) if "image/png" not in o.get("data", {})
                        ]
                    }
                ]
            )
        if f := scan(text):
            found[p.relative_to(ROOT).as_posix()] = f
    assert not found


def test_nothing_speaks_of_the_machine_it_was_written_on():
    words = re.compile(r"/work/main|/root/|\.\./shared|/\.library")
    assert not {
        p.name: m[0]
        for p in tracked()
        if p.suffix in (".py", ".ipynb", ".md", ".toml", ".ini", ".yml", ".cfg", ".lock")
        or p.name in ("Makefile", "run")
        if p.name != "test_house.py" and (m := words.search(p.read_text(errors="replace")))
    }


WIDTH = 100


def long_lines(name, text):
    """Lines of code that are too long: (name, line).

    Tables, text from elsewhere and URLs cannot be broken.
    """
    return [
        (name, line)
        for line in text.splitlines()
        if len(line) > WIDTH and "://" not in line and not line.lstrip().startswith(("|", "%"))
    ]


def test_no_line_of_code_is_longer_than_a_hundred_columns():
    files = [p for folder in ("tests", "tools") for p in (ROOT / folder).rglob("*.py")]
    files += [ROOT / name for name in ("conftest.py", "Makefile", "Dockerfile", "compose.yaml")]
    files += [*(ROOT / "docker").glob("*.sh"), *(ROOT / ".github" / "workflows").glob("*.yml")]
    # of the modules, `_modidx.py` is left out: it is an index for nbdev, data
    found = [x for p in [*files, *MODULES] for x in long_lines(p.name, p.read_text())]
    for p in NOTEBOOKS:
        found += [x for source in code(p) for x in long_lines(page(p), source)]
    assert not found
    assert long_lines("x", "y" * 101) and not long_lines("x", f"# https://{'y' * 101}")


def test_no_two_pages_have_one_name():
    names = [p.name for p in NOTEBOOKS]
    assert sorted(set(names)) == sorted(names)
    titles = ["".join(cells(p)[0]["source"]).splitlines()[0] for p in NOTEBOOKS]
    assert sorted(set(titles)) == sorted(titles)


def test_package_says_that_it_is_typed():
    assert (LIB / "py.typed").is_file()  # that the wheel has it, tests/test_bundle.py shows


def test_no_program_is_hidden_in_a_string_of_a_test():
    "Programs are files in tests/programs, where they are formatted, linted and read."
    hidden = []
    for p in (ROOT / "tests").glob("*.py"):
        for node in ast.walk(ast.parse(p.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                lines = node.value.count("\n")
                imports = re.search(r"^\s*(import \w|from \w[\w.]* import )", node.value, re.M)
                if lines > 4 and imports:
                    hidden.append((p.name, node.lineno))
    assert not hidden
