"""The pages of the site, as Quarto gets them, and its configuration.

What only rendering shows (that Quarto accepts the pages, how its menus open, its search) is seen
where `make docs` runs; a rendered site in _docs is read here as well.
"""

import ast
import builtins
import html
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import NBS, ROOT

sys.path.insert(0, str(ROOT / "tools"))
import docs  # noqa: E402
import reference  # noqa: E402

FENCE = re.compile(r"^(`{3,}) ?(\{.*?\}|\w*)\n(.*?)\n\1$", re.M | re.S)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The folder with all pages, and the notebooks by name."
    to = tmp_path_factory.mktemp("site")
    before = {p: p.stat().st_mtime_ns for p in [ROOT / "README.md", *NBS.iterdir()]}
    pages = docs.make_pages(to)
    now = {p: p.stat().st_mtime_ns for p in [ROOT / "README.md", *NBS.iterdir()]}
    assert now == before, "making the pages changed the repository"
    return to, pages


@pytest.fixture(scope="module")
def texts(site):
    to, _ = site
    return {p.relative_to(to).with_suffix("").as_posix(): p.read_text() for p in to.rglob("*.qmd")}


@pytest.fixture(scope="module")
def config(site):
    return yaml.safe_load((site[0] / "_quarto.yml").read_text())


def prose(text):
    "Without code."
    return FENCE.sub("", text)


def test_pages_have_names_of_their_own_and_a_place_in_a_sidebar(texts, config):
    assert len({name.lower() for name in texts}) == len(texts) > 120
    listed = [n for bar in config["website"]["sidebar"] for n in docs.listed(bar["contents"])]
    assert len(set(listed)) == len(listed)
    assert {n.removesuffix(".qmd") for n in listed} | {"index"} == texts.keys()
    titles = [yaml.safe_load(t.split("---")[1])["title"] for t in texts.values()]
    assert len(set(titles)) == len(titles)
    assert [bar["title"] for bar in config["website"]["sidebar"]] == [
        "Guides", "Concepts", "Chapters", "Reference",
    ]  # fmt: skip


def test_site_is_left_in_docs_and_nothing_else_changes(tmp_path, monkeypatch, capfd):
    pages, to, tools = tmp_path / "_proc", tmp_path / "_docs", tmp_path / "bin"
    for p in (pages, to, tools):
        p.mkdir()
    (pages / "index.qmd").write_text("---\ntitle: x\n---\n")
    (to / "old.html").write_text("")
    monkeypatch.setenv("PATH", str(tools))
    with pytest.raises(SystemExit, match="make docs needs Quarto"):
        docs.render(pages, to)
    quarto = tools / "quarto"
    output = yaml.safe_load((ROOT / "_quarto.yml").read_text())["project"]["output-dir"]
    quarto.write_text(f"#!/bin/sh\n/bin/mkdir {output} && echo page > {output}/index.html\n")
    quarto.chmod(quarto.stat().st_mode | stat.S_IXUSR)
    docs.render(pages, to)
    assert sorted(p.name for p in to.iterdir()) == ["index.html", "index.html.md"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["_docs", "_proc", "bin"]
    quarto.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(SystemExit):
        docs.render(pages, to)
    assert (to / "index.html").is_file(), "a failed rendering removed the site"


def shown_code(text):
    "The Python on a page that is not folded."
    open_text = re.sub(r"<details.*?</details>", "", text, flags=re.S)
    return "\n".join(code for _, kind, code in FENCE.findall(open_text) if kind == "{.python}")


def test_source_of_what_is_discussed_is_shown(site, texts):
    seen = 0
    for name, page in site[1].items():
        own = {s.name for s in page.symbols if "." not in s.name}
        code = shown_code(texts[name])
        for symbol in own & docs.code_names(page):
            assert re.search(rf"^\s*(async )?(def|class) {symbol}\b", code, re.M), (name, symbol)
            seen += 1
    assert seen > 120


def test_all_exported_source_is_on_its_page_in_its_order(site, texts):
    symbols = 0
    for name, page in site[1].items():
        assert "Source of </summary>" not in texts[name], name
        code = "\n".join(code for _, _, code in FENCE.findall(texts[name]))
        for cell in page.cells:
            if {"export", "exports"} & {*docs.directives(cell["source"])}:
                for line in docs.DIRECTIVE.sub("", cell["source"]).strip().splitlines():
                    assert line in code, (name, line)
        own = [s.name for s in page.symbols if "." not in s.name]
        assert re.findall(r"^#+ `(\w+)` \{#\1\}$", texts[name], re.M) == own, name
        symbols += len(own)
    assert symbols > 700


def test_signatures_are_as_they_were_written(texts):
    seen = 0
    for name, text in texts.items():
        for _, kind, code in FENCE.findall(text):
            if kind == "{.python .signature}":
                assert not re.search(r"\]\(|__main__|<\w+ ?|\bPosixPath\(", code), (name, code)
                assert re.match(r"(@[^\n]*\n(\s+[^\n]*\n)*)*(async )?(def|class) ", code), code
                ast.parse(code + ("\n    pass" if code.rstrip().endswith(":") else ""))
                seen += 1
    assert seen > 50


SOURCE = """
LIMIT = 3


def first(
    x: int = LIMIT,  # A number
) -> int:
    "One."
    return x


# Why there is a second
@cache
def second():
    "Two."
    return 2


def _hidden():
    return 0
"""


def test_cell_is_cut_where_definitions_begin():
    found = docs.pieces(SOURCE.strip())
    assert [node and node.name for node, _ in found] == [None, "first", "second"]
    assert found[0][1] == "LIMIT = 3"
    assert found[2][1].startswith("# Why there is") and found[2][1].endswith("return 0")
    head = docs.signature(*found[1])
    assert head.endswith('"One."') and "# A number" in head
    assert docs.signature(*found[2]).endswith('"Two."')


REMOTE = re.compile(
    r"""<(?:script|link|iframe|img)[^>]+(?:src|href)=["']?(?:https?:)?//[^\s"'>]+"""
    r"""|@import\s+(?:url\()?["']?(?:https?:)?//|url\(["']?(?:https?:)?//""",
    re.I,
)


def remote_parts(text):
    "What a browser would fetch from elsewhere; links that a reader clicks are none."
    found = [m[0] for m in REMOTE.finditer(text)]
    return [m for m in found if not re.match(r"<link[^>]+rel=.?(canonical|alternate)", m)]


def test_no_page_needs_another_host(site, texts, config):
    assert remote_parts('<script src="https://x/require.js">') and remote_parts("@import '//x'")
    assert not {n: f for n, t in texts.items() if (f := remote_parts(FENCE.sub(raw_only, t)))}
    for theme in config["format"]["html"]["theme"].values():
        assert [n for n in theme if not n.endswith(".scss")] == ["default"]  # others load fonts
    for p in [*site[0].glob("*.scss"), *site[0].glob("*.html")]:
        assert not remote_parts(p.read_text()), p.name
    assert config["format"]["html"]["html-math-method"] == "mathml"
    for p in (ROOT / "_docs").rglob("*.html") if (ROOT / "_docs").exists() else []:
        assert not remote_parts(p.read_text()), p


def raw_only(m):
    "Of the blocks of a page, those that reach the browser as they are."
    return m[3] if m[2] == "{=html}" else ""


def anchors_of(text):
    "Where a link may lead on a page: what it names, and what pandoc makes of headings."
    found = set(re.findall(r"\{#([\w.-]+)\}", text))
    for heading in re.findall(r"^#+ (.*)$", prose(text), re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.add(re.sub(r"[^\w\s.-]", "", words).strip().replace(" ", "-"))
    return found


def test_links_of_pages_lead_somewhere_and_stay_here(site, texts):
    seen = own = 0
    anchors = {name: anchors_of(text) for name, text in texts.items()}
    for name, text in texts.items():
        for link in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
            assert "codex-nb.github.io" not in link, (name, link)
            if re.match(r"[a-z]+:", link):
                continue
            there, _, anchor = link.partition("#")
            path = (site[0] / name).parent / there if there else site[0] / f"{name}.qmd"
            target = os.path.relpath(path.resolve(), site[0]).removesuffix(".qmd")
            assert target in texts or path.exists() or "." not in there, (name, link)
            if anchor and target in texts:
                assert anchor in anchors[target], (name, link)
                own += anchor[:1].isupper() or "_" in anchor
            seen += 1
    assert seen > 2000 and own > 1000


def test_outputs_are_plain(texts):
    rows = 0
    for name, text in texts.items():
        assert not re.search(r"/tmp/(tmp|codex_nb-|tutorial-)\w", text), name
        assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", text), name
        for block in re.findall(r"^`{3,}\{=html\}\n(.*?)\n`{3,}$", text, re.M | re.S):
            if block.startswith("<iframe"):
                continue
            assert not re.search(r"<(style|script)|class=.dataframe", block), name
            index = re.findall(r"<tr>\s*<th>(\d+)</th>", block)
            assert index != [str(i) for i in range(len(index))] or not index, (name, block[:300])
            rows += block.count("<tr>")
    assert rows > 300


FRAME = """<div><style scoped>th {}</style><table border="1" class="dataframe"><thead>
<tr style="text-align: right;"><th></th><th>run</th></tr></thead><tbody><tr><th>0</th>
<td>a &lt; b</td></tr></tbody></table></div>"""


def test_prose_leads_to_what_it_names():
    page = docs.Page("guides/x", [])
    index = docs.names_index({})
    for text, target in (
        ("run `codex-nb replay RUN --steps 3`", "../reference/commands.qmd#replay"),
        ("`codex-nb store gc` frees", "../reference/commands.qmd#store-gc"),
        ("give `-p lr 1e-3`", "../reference/settings.qmd#lr"),
        ("with `micro_batch=4`", "../reference/settings.qmd#micro_batch"),
        ("`CODEX_NB_HOME` is", "../reference/environment.qmd#environment-variables"),
    ):
        assert f"]({target})" in docs.link_names(page, text, index), text
    for text in (
        "`lr`",
        "```sh\ncodex-nb runs `codex-nb runs`\n```",
        "[`codex-nb runs`](x)",
        "# `-p lr 1`",
    ):
        assert docs.link_names(page, text, index) == text
    twice = docs.link_names(page, "`codex-nb runs` and `codex-nb runs`", index)
    assert twice.count("](") == 1


def names_missing(code):
    "Names that Python code uses and neither defines nor imports."
    tree = ast.parse(code)
    bound = {
        n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    }
    bound |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
    bound |= {n.name for n in ast.walk(tree) if isinstance(n, docs.PUBLIC)}
    bound |= {n.name for n in ast.walk(tree) if isinstance(n, ast.ExceptHandler)}
    imports = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]
    bound |= {a.asname or a.name.split(".")[0] for n in imports for a in n.names}
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    return used - bound - {*dir(builtins)}


def test_python_of_tutorials_and_guides_can_be_copied(texts):
    seen = 0
    for name, text in texts.items():
        if name.startswith(("tutorials/", "guides/")) or name == "index":
            code = shown_code(text)
            assert not names_missing(code), name
            seen += code.count("import ")
    assert seen > 20 and names_missing("import re\nf(re)") == {"f"}


def test_pages_say_where_they_are(site, texts):
    for name, page in site[1].items():
        title = yaml.safe_load(texts[name].split("---")[1])["title"]
        if number := re.match(r"(\d+)_", Path(name).name):
            assert title.startswith(f"{int(number[1]):0{len(number[1])}}. "), name
        if page.module:
            place = texts[name].partition(":::\n\n")[0]
            assert f"module `codex_nb.{page.module}`" in place and f"nbs/{name}.ipynb" in place


def test_tutorials_begin_with_what_they_need_give_and_take(texts):
    tutorials = [t for name, t in texts.items() if name.startswith("tutorials/")]
    for text in tutorials:
        first = text.split("---\n\n", 1)[1].split("\n\n")[0]
        assert re.match(r"\*\*You need\*\* .+ \*\*You get\*\* .+ \*\*It takes\*\* ", first), first
    assert len(tutorials) == 8
    assert texts["tutorials/4_check_a_run"].index("| L0 |") < texts[
        "tutorials/4_check_a_run"
    ].index("```")


def test_figures_of_the_front_page_are_those_that_were_measured():
    stored = (NBS / "benchmarks" / "training.ipynb").read_text()
    race = json.loads((ROOT / "data" / "cuda.json").read_text())["checks"]["race"]["figures"]
    on_gpu = {f"{n:,}" for n in race["tokens/s"].values()}
    rows = re.findall(r"^\| .*fp32.*|^\| .*bf16.*", (ROOT / "README.md").read_text(), re.M)
    seen = 0
    for row in rows:
        for figure in re.findall(r"\d+,\d{3}", row):
            assert figure in on_gpu if "GPU" in row else f">{figure}<" in stored, row
            seen += 1
    assert len(rows) == 3 and seen == 10


def test_table_of_a_result_is_tidied():
    found = docs.plain_html(FRAME)
    assert "<style" not in found and "dataframe" not in found and "<th></th>" not in found
    assert "<td>a &lt; b</td>" in found and "<th>0</th>" not in found
    named = docs.plain_html(FRAME.replace("<th>0</th>", "<th>lr</th>"))
    assert "<th>lr</th>" in named  # an index that says something stays


def test_shell_is_marked_as_shell(site, texts):
    for name, page in site[1].items():
        for cell in page.cells:
            if commands := docs.shell(cell["source"]):
                assert f"``` {{.bash}}\n{commands}\n```" in texts[name]
    assert not [n for n, t in texts.items() if re.search(r"^%%bash", t, re.M)]


def colours(name):
    return dict(re.findall(r"^\$nb-([\w-]+): (#\w{6});", (NBS / name).read_text(), re.M))


def contrast(a, b):
    "As WCAG 2.1 defines it: from 1 to 21."

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


CODE = "plain comment keyword string number function builtin operator error code link muted".split()
PAIRS = [(text, ground) for ground in ("ground", "panel") for text in ("text", "muted", "link")]
PAIRS += [(text, "code-ground") for text in CODE]
PAIRS += [("code", "ground"), ("active", "active-ground"), ("plain", "ground")]


@pytest.mark.parametrize("theme", ["theme-light.scss", "theme-dark.scss"])
def test_every_colour_of_text_can_be_read(theme):
    found = colours(theme)
    low = {p: round(c, 2) for p in PAIRS if (c := contrast(found[p[0]], found[p[1]])) < 4.5}
    assert not low
    assert {*found} == {name for pair in PAIRS for name in pair} | {"line"}
    assert contrast("#000000", "#ffffff") == 21 and contrast("#777777", "#ffffff") < 4.5
    used = {*re.findall(r"\$nb-([\w-]+)", (NBS / "theme.scss").read_text())}
    assert used <= {*found}


def test_page_of_settings_has_every_one(texts):
    from codex_nb.run.setting_table import field_comments, preset_table, setting_table
    from codex_nb.run.settings import KINDS

    page, seen = texts["reference/settings"], 0
    for kind, cls in KINDS.items():
        for row in preset_table(kind):
            assert re.search(rf"^\| {row['preset']} \|.*{re.escape(row['for'])}", page, re.M), row
        for info in setting_table(cls):
            anchor = f"\\{{#({info.section}-)?{info.name}\\}}"
            entry = re.search(rf"^### `{info.name}` {anchor}$", page, re.M)
            assert entry, info.name
            assert info.meaning in page and reference.cell(info.type) in page, info.name
            for preset, value in info.presets.items():
                assert f"{preset} {reference.code(value)}" in page, (info.name, preset)
            seen += 1
    assert seen > 300 and field_comments(KINDS["train"])["seed"] in page


def test_page_of_commands_has_every_one(texts):
    def check(words, command):
        title = " ".join(words)
        assert f"`{title}` {{#{'-'.join(words[1:])}}}" in texts["reference/commands"]
        for p in command.params:
            if p.name != "help" and not getattr(p, "hidden", False):
                assert reference.cell(p.help or "") in texts["reference/commands"], (title, p.name)
        below = getattr(command, "commands", {})
        return 1 + sum(check([*words, n], c) for n, c in below.items())

    tree = reference.command_tree()
    assert sum(check(["codex-nb", n], c) for n, c in tree.commands.items()) > 50


def test_pages_of_variables_codes_and_files(texts):
    from codex_nb.core.config import ENVIRONMENT
    from codex_nb.experiments.launch import _EXIT_CODES
    from codex_nb.train.interrupts import EXIT_CODES

    page = texts["reference/environment"]
    for name, text in ENVIRONMENT.items():
        assert f"| `{name}` | {text} |" in page
    for number in {0, 1, 2, *_EXIT_CODES.values(), *EXIT_CODES.values()}:
        assert f"| `{number}` |" in page, number
    for key in ("schema", "exact", "identity", "parents", "attachments", "check"):
        assert f'"{key}"' in texts["reference/files"], key


def test_index_of_the_api_is_complete_and_sorted(site, texts):
    named = re.findall(r"^\| \[`([\w.]+)`\]", texts["reference/api"], re.M)
    assert sorted(named) == sorted(s.name for p in site[1].values() for s in p.symbols)
    assert named == sorted(named, key=str.lower) and len(named) > 1200


def test_programs_find_every_page(site, texts, config):
    listed = re.findall(
        r"^- \[.+\]\((\S+)\.html\.md\): .+$", (site[0] / "llms.txt").read_text(), re.M
    )
    assert {*listed} | {"index"} == texts.keys()
    for name in config["project"]["resources"]:
        assert (site[0] / name).is_file(), name


def test_configuration_says_what_a_reader_needs(config):
    web = config["website"]
    assert web["site-url"].startswith("https://") and web["repo-url"].startswith("https://")
    assert web["bread-crumbs"] and web["page-navigation"] and web["search"]["location"] == "navbar"
    bar = html.escape(str(web["navbar"]))
    version = docs.settings()["version"]
    assert f"Version {version}" in bar and "Report an issue" in bar and "Repository" in bar
    assert version in str(web["page-footer"]) and "make docs-serve" in str(web["page-footer"])
    assert not re.search(r"VERSION|REPOSITORY|ADDRESS", str(config))


def test_serving_needs_a_site(tmp_path):
    with pytest.raises(SystemExit, match="make docs renders it"):
        docs.serve(tmp_path)
    done = subprocess.run(
        ["make", "-n", "docs-serve"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "tools/docs.py --serve" in done.stdout
