"""`make docs`: the pages of the site into _proc/, and with Quarto the site into _docs/.

A page is Markdown, made from the stored outputs of a notebook. Nothing is executed, so a page shows
what the tests have compared, and the source that is in the notebook. nbdev's own way to the site
executes each chapter, hides exported cells and asks other hosts for scripts.

`python tools/docs.py --pages` stops before Quarto; `--serve` shows a rendered site on this machine.
"""

import ast
import base64
import functools
import html
import http.server
import json
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import yaml
from reference import reference_anchors, reference_pages

ROOT = Path(__file__).resolve().parent.parent
DIRECTIVE = re.compile(r"^#\|\s*(.*?)\s*\n?$", re.M)
PUBLIC = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass
class Symbol:
    "A public function or class."

    name: str  # With its class, for a method
    page: "Page"
    about: str  # First line of its docstring


@dataclass(eq=False)
class Page:
    "A notebook on its way to the site."

    name: str  # Below nbs/, without ending
    cells: list[dict]
    title: str = ""
    about: str = ""  # The line below the title
    module: str | None = None  # Of a chapter
    symbols: list[Symbol] = field(default_factory=list)

    @property
    def number(self):
        "Of a chapter or tutorial; None for other pages."
        found = re.match(r"(\d+)_", self.name.rpartition("/")[2])
        return found and found[1]

    @property
    def heading(self):
        return f"{self.number}. {self.title}" if self.number else self.title

    def link(self, other, anchor=""):
        "From this page to another, or to a place on it."
        up = "../" * self.name.count("/")
        there = "" if other is self else f"{up}{other.name}.qmd"
        return there + (f"#{anchor}" if anchor else "")


def text_of(value):
    return "".join(value) if isinstance(value, list) else value or ""


def directives(source):
    return [m.split()[0].rstrip(":") for m in DIRECTIVE.findall(source) if m]


def option(source, name):
    "The value of a cell's option, such as `fig-alt`."
    found = re.search(rf"^#\| {name}: (.*)$", source, re.M)
    return found[1].strip().strip('"') if found else ""


def read_pages(nbs):
    "Every notebook, by name."
    pages = {}
    for p in sorted(nbs.rglob("*.ipynb")):
        if ".ipynb_checkpoints" in p.parts:
            continue
        page = Page(
            p.relative_to(nbs).with_suffix("").as_posix(), json.loads(p.read_text())["cells"]
        )
        for cell in page.cells:
            cell["source"] = text_of(cell["source"])
            if cell["cell_type"] == "markdown" and not page.title:
                page.title = re.search(r"^# (.*)$", cell["source"], re.M)[1]
                about = re.search(r"^> (.*)$", cell["source"], re.M)
                page.about = about[1] if about else ""
                cell["source"] = re.sub(r"\A\s*# .*\n*(> .*)?", "", cell["source"]).strip()
            if found := re.search(r"^#\| default_exp (\S+)", cell["source"], re.M):
                page.module = found[1]
            if {"export", "exports"} & {*directives(cell["source"])}:
                page.symbols += symbols_of(page, cell["source"])
        pages[page.name] = page
    return pages


def first_line(node):
    return (ast.get_docstring(node) or "").partition("\n")[0]


def symbols_of(page, source):
    "What a cell defines for others, in its order."
    for node in ast.parse(source).body:
        if isinstance(node, PUBLIC) and not node.name.startswith("_"):
            yield Symbol(node.name, page, first_line(node))
            for part in node.body if isinstance(node, ast.ClassDef) else []:
                if isinstance(part, PUBLIC) and not part.name.startswith("_"):
                    yield Symbol(f"{node.name}.{part.name}", page, first_line(part))


# What a page consists of


def fence(text, *classes):
    "A block of code that no line of the text can end."
    ticks = "`" * max(3, 1 + max((len(m) for m in re.findall(r"^`+", text, re.M)), default=0))
    return f"{ticks} {{{' '.join('.' + c for c in classes)}}}\n{text.rstrip()}\n{ticks}"


def folded(summary, body):
    head = f'<details class="code-fold"><summary>{html.escape(summary)}</summary>'
    return f"{head}\n\n{body}\n\n</details>"


def pieces(source):
    """Cut a cell where a public function or class begins.

    Pairs of names and source. What stands between two belongs to the first, and comments directly
    above a definition to it; what comes before all has no name.
    """
    lines, cuts = source.splitlines(), []
    for node in ast.parse(source).body:
        if isinstance(node, PUBLIC) and not node.name.startswith("_"):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
            while first and lines[first - 1].startswith("#"):
                first -= 1
            cuts.append((node, first))
    if not cuts:
        return [(None, source)]
    ends = [first for _, first in cuts[1:]] + [len(lines)]
    found = [(node, "\n".join(lines[a:b]).strip("\n")) for (node, a), b in zip(cuts, ends)]
    before = "\n".join(lines[: cuts[0][1]]).strip("\n")
    return [(None, before)] * bool(before) + found


def signature(node, source):
    "A definition without its body: what to give and what comes back, with the comments."
    lines = source.splitlines()
    start = next(i for i, line in enumerate(lines) if re.match(r"(async )?(def|class) ", line))
    shift = node.lineno - 1 - start  # the piece begins somewhere in its cell
    if isinstance(node, ast.ClassDef):
        simple = (ast.AnnAssign, ast.Expr)
        body = [n for n in node.body if isinstance(n, simple)] or node.body[:1]
        last = max(n.end_lineno for n in body if isinstance(n, simple)) if body else node.lineno
        methods = (n for n in node.body if isinstance(n, PUBLIC))
        starts = [min([m.lineno, *(d.lineno for d in m.decorator_list)]) for m in methods]
        last = min([last, *(first - 1 for first in starts)])
    else:
        has_doc = ast.get_docstring(node) is not None
        last = node.body[0].end_lineno if has_doc else node.body[0].lineno - 1
    return "\n".join(lines[: last - shift]).rstrip()


def code_names(page):
    "Names that the prose of a page discusses."
    prose = " ".join(c["source"] for c in page.cells if c["cell_type"] == "markdown")
    return set(re.findall(r"`([A-Za-z_]\w*)(?:\.\w+)*(?:\([^`]*\))?`", prose))


def exported_cell(page, cell, level):
    "The source of a cell that becomes part of the module."
    is_open = "exports" in directives(cell["source"])
    source = DIRECTIVE.sub("", cell["source"]).strip("\n")
    discussed, parts = code_names(page), []
    for node, text in pieces(source):
        if node is None:
            body = ast.parse(text).body
            lines = [n for b in body for n in (b.body if isinstance(b, ast.If) else [b])]
            only_imports = all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in lines)
            targets = [t for n in body if isinstance(n, ast.Assign) for t in n.targets]
            names = {t.id for t in targets if isinstance(t, ast.Name)}
            show = not only_imports and (is_open or discussed & names)
            block = fence(text, "python")
            defined = sorted(names) + [n.name for n in body if isinstance(n, PUBLIC)]
            of = f" of {', '.join(defined)}" if defined else ""
            title = "Imports" if only_imports else f"Source{of}"
            parts.append(block if show else folded(title, block))
            continue
        anchors = "".join(
            f"[]{{#{node.name}.{n.name}}}"
            for n in getattr(node, "body", [])
            if isinstance(node, ast.ClassDef)
            and isinstance(n, PUBLIC)
            and not n.name.startswith("_")
        )
        parts.append(f"{'#' * level} `{node.name}` {{#{node.name}}}")
        if anchors:
            parts.append(anchors)
        if is_open or node.name in discussed:
            parts.append(fence(text, "python"))
        else:
            head = signature(node, text)
            if head == text:  # fields alone: there is nothing to fold
                parts.append(fence(text, "python"))
                continue
            parts.append(fence(head, "python", "signature"))
            parts.append(folded("Source", fence(text, "python")))
    return parts


# What a cell has shown


class Tidy(HTMLParser):
    "Keeps the tags of a table or text, without styles, scripts and what refers elsewhere."

    DROP = ("style", "script")

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts, self.dropping, self.first_column = [], 0, False

    def handle_starttag(self, tag, attrs):
        if tag in self.DROP:
            self.dropping += 1
        if self.dropping:
            return
        kept = {k: v for k, v in attrs if k in ("colspan", "rowspan", "title", "open") and v != ""}
        style = dict(attrs).get("style") or ""
        if tag in ("mark", "span", "pre", "div", "summary", "details"):
            kept |= {"style": style} if style else {}
        elif tag == "td" and "text-align: right" in style:
            kept["style"] = "text-align: right"
        words = "".join(f' {k}="{html.escape(v or "")}"' for k, v in kept.items())
        self.parts.append(f"<{tag}{words}>")

    def handle_endtag(self, tag):
        if tag in self.DROP:
            self.dropping -= 1
        elif not self.dropping:
            self.parts.append(f"</{tag}>")

    def handle_data(self, data):
        if not self.dropping:
            self.parts.append(html.escape(data, quote=False))


INDEX = re.compile(r"<tr[^>]*>\s*<th></th>")


def without_index(table):
    "A DataFrame without its index, where that only counts the rows."
    rows = re.findall(r"<tr>\s*<th>(.*?)</th>", table.partition("<tbody>")[2], re.S)
    if not INDEX.search(table) or rows != [str(i) for i in range(len(rows))]:
        return table
    head, tag, body = table.partition("<tbody>")
    head = INDEX.sub("<tr>", head)
    return head + tag + re.sub(r"(<tr>)\s*<th>.*?</th>", r"\1", body, flags=re.S)


def plain_html(text):
    "A result in HTML as something that any page can hold."
    if re.search(r"<style>", text):  # a whole page with a style of its own
        inside = html.escape(text).replace("\n", "&#10;")
        return f'<iframe class="report" title="A report" srcdoc="{inside}"></iframe>'
    tidy = Tidy()
    tidy.feed(text)
    found = without_index("".join(tidy.parts))
    found = re.sub(r"<table>", '<div class="table-box"><table class="data">', found)
    return re.sub(r"</table>", "</table></div>", found).strip()


def raw_html(text):
    ticks = "`" * max(3, 1 + max((len(m) for m in re.findall(r"`+", text)), default=0))
    return f"{ticks}{{=html}}\n{text}\n{ticks}"


TEMPORARY = re.compile(r"/(?:tmp)/(?:codex_nb-|tmp\.?|tutorial-|port\b)\w*")
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # that an untrained model may write
ANSI = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")


class Outputs:
    "Writes what the cells of a page have shown; pictures become files beside it."

    def __init__(self, page, to):
        self.page, self.to, self.pictures = page, to, 0
        self.folders = {}  # temporary ones -> what a reader would have in its place

    def readable(self, text):
        "Text with the reader's folders in place of temporary ones, and without colours."

        def named(m):
            more = f"{len(self.folders) + 1}" if self.folders else ""
            return self.folders.setdefault(m[0], f"~/work{more}")

        return CONTROL.sub("\ufffd", TEMPORARY.sub(named, ANSI.sub("", text)))

    def show(self, output, source):
        data = output.get("data", {})
        if output["output_type"] == "stream":
            return fence(self.readable(text_of(output["text"])), "output", output["name"])
        for kind, ending in (("image/svg+xml", "svg"), ("image/png", "png")):
            if kind in data:
                return self.picture(text_of(data[kind]), ending, source)
        if "text/html" in data:
            return raw_html(plain_html(self.readable(text_of(data["text/html"]))))
        if "text/markdown" in data:
            return self.readable(text_of(data["text/markdown"]))
        return fence(self.readable(text_of(data.get("text/plain"))), "output")

    def picture(self, data, ending, source):
        self.pictures += 1
        name = f"{self.page.name.rpartition('/')[2]}_files/{self.pictures}.{ending}"
        path = (self.to / self.page.name).parent / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if ending == "svg" else base64.b64decode(data))
        alt = option(source, "fig-alt").replace('"', "'")
        caption = option(source, "fig-cap")
        return f'![{caption}]({name}){{.plot fig-alt="{alt}"}}'


# Prose


def link_targets(page, text, exists, repository):
    "Links between notebooks become links between pages; to files beside nbs/, to the repository."

    def link(m):
        there, mark, anchor = m[1].partition("#")
        if not there or re.match(r"[a-z]+:", there):
            return m[0]
        if there.endswith(".ipynb"):
            return f"]({there.removesuffix('.ipynb')}.qmd{mark}{anchor})"
        if exists(page, there):
            return m[0]
        inside = re.sub(r"^(\.\./)+", "", there)
        return f"]({repository}/blob/main/{inside}{mark}{anchor})"

    return re.sub(r"\]\(([^)\s]+)\)", link, text)


def place_of(text, index):
    "Where a text in the type of code is explained: page and anchor, or None."
    if text in index:
        return index[text]
    words = text.split()
    if words[:1] == ["codex-nb"]:
        return index.get(" ".join(words[:3])) or index.get(" ".join(words[:2]))
    if words[:1] == ["-p"] and words[1:]:
        return index.get(f"-p {words[1]}")
    if setting := re.fullmatch(r"([a-z]\w*)=\S*", text):
        return index.get(f"-p {setting[1]}")
    return index.get(text.removesuffix("()"))


def link_names(page, text, index):
    """Lead from the first mention in a text to where a thing is explained.

    Things are functions, classes, modules, commands, settings and environment variables.
    """
    seen = {page.module}

    def link(m):
        found = place_of(m[1], index)
        if found is None or m[1] in seen or found in seen:
            return m[0]
        seen.update({m[1], found})
        other, anchor = found
        if other.name == page.name and not anchor:
            return m[0]
        return f"[`{m[1]}`]({page.link(other, anchor)})"

    parts = re.split(
        r"(^```.*?^```|^#.*?$|\[[^\]]*\]\([^)]*\)|\$[^$\n]+\$)", text, flags=re.M | re.S
    )
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"`([^`\n]+)`", link, parts[i])
    return "".join(parts)


def names_index(pages):
    "What prose may name -> page and anchor. Of names that several chapters define, none."
    found = {}
    for page in pages.values():
        if not page.module:
            continue
        for name in (page.module, f"codex_nb.{page.module}", page.name.rpartition("/")[2]):
            found.setdefault(name, []).append((page, ""))
        if not page.module.startswith("cli."):
            for s in page.symbols:
                found.setdefault(s.name, []).append((page, s.name))
    known = {name: places[0] for name, places in found.items() if len(places) == 1}
    generated = {n: Page(f"reference/{n}", []) for n in ("commands", "settings", "environment")}
    for page, anchors in reference_anchors().items():
        known |= {key: (generated[page], anchor) for key, anchor in anchors.items()}
    return known


def shell(source):
    "The commands of a shell cell, or None for another."
    found = re.match(r"%%bash.*\n", source)
    return source[found.end() :].strip("\n") if found else None


def used_imports(page, source):
    "Of a hidden cell of imports, what the cells that are shown need: a reader copies them."
    shown = [
        DIRECTIVE.sub("", c["source"])
        for c in page.cells
        if c["cell_type"] == "code" and "hide" not in directives(c["source"])
    ]
    code = "\n".join(re.sub(r"^%.*\n?", "", s, flags=re.M) for s in shown if shell(s) is None)
    used = {n.id for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Name)}
    lines = []
    for node in ast.parse(source).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            node.names = [n for n in node.names if (n.asname or n.name.split(".")[0]) in used]
            lines += [ast.unparse(node)] if node.names else []
    return "\n".join(lines)


def top_of(page, site):
    "Title and description, and for a chapter where its text comes from."
    about = link_targets(page, page.about, site["exists"], site["repository"])
    head = {"title": page.heading, "description": about}
    parts = [f"---\n{yaml.safe_dump(head, allow_unicode=True, sort_keys=False)}---"]
    if page.module:
        notebook = f"nbs/{page.name}.ipynb"
        parts.append(
            f"::: {{.place}}\nChapter {page.number} · module `codex_nb.{page.module}` · "
            f"[{notebook}]({site['repository']}/blob/main/{notebook})\n:::"
        )
    return parts


def page_text(page, site, index, to):
    "A page of the site as Markdown."
    parts, outputs, level = top_of(page, site), Outputs(page, to), 1
    for cell in page.cells:
        source = cell["source"]
        marks = directives(source)
        if cell["cell_type"] != "code":
            text = link_targets(page, source, site["exists"], site["repository"])
            parts.append(link_names(page, text, index))
            headings = re.findall(r"^(#+) ", re.sub(r"```.*?```", "", source, flags=re.S), re.M)
            level = len(headings[-1]) if headings else level
            continue
        if "hide" in marks and not page.module and (lines := used_imports(page, source)):
            parts.append(fence(lines, "python"))
        if {"hide", "default_exp"} & {*marks}:
            continue
        if {"export", "exports"} & {*marks}:
            parts += exported_cell(page, cell, min(level + 1, 3))
        elif (commands := shell(source)) is not None:
            parts.append(fence(commands, "bash"))
        elif code := re.sub(r"^%+.*\n?", "", DIRECTIVE.sub("", source), flags=re.M).strip():
            block = fence(code, "python")
            parts.append(folded("Code", block) if option(source, "code-fold") == "true" else block)
        shown = [outputs.show(o, source) for o in cell.get("outputs", [])]
        parts += [f"::: {{.result}}\n{text}\n:::" for text in shown if text]
    return "\n\n".join(p for p in parts if p) + "\n"


# The site


def settings():
    found = ConfigParser()
    found.read(ROOT / "settings.ini")
    return found["DEFAULT"]


def configuration(site):
    "Quarto's configuration of the pages: that of the repository, with what is known elsewhere."
    text = (ROOT / "_quarto.yml").read_text()
    text = text.replace(".ipynb", ".qmd").replace("VERSION", site["version"])
    return text.replace("REPOSITORY", site["repository"]).replace("ADDRESS", site["address"])


def listed(contents):
    "Files of a sidebar, in its order."
    for entry in contents:
        if isinstance(entry, str):
            yield entry
        elif "contents" in entry:
            yield from listed(entry["contents"])
        elif "href" in entry:
            yield entry["href"]


def llms_text(site, config, titles):
    "A list of all pages with a line on each, for programs that read documentation."
    parts = [f"# codex_nb\n\n> {config['website']['description']}"]
    for bar in config["website"]["sidebar"]:
        lines = []
        for name in listed(bar["contents"]):
            title, about = titles[name.removesuffix(".qmd")]
            lines.append(f"- [{title}]({name.removesuffix('qmd')}html.md): {about}")
        parts.append(f"## {bar['title']}\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def is_below(folder, path):
    return path.exists() and path.resolve().is_relative_to(folder.resolve())


def make_pages(to, nbs=ROOT / "nbs", only=None):
    "Write all pages, or those named, with all that Quarto needs beside them. The pages by name."
    ini = settings()
    pages = read_pages(nbs)
    site = {
        "version": ini["version"],
        "repository": ini["git_url"],
        "address": ini["doc_host"] + ini["doc_baseurl"],
        "exists": lambda page, there: is_below(nbs, (nbs / page.name).parent / there),
    }
    index, titles = names_index(pages), {}
    for name, page in pages.items():
        titles[name] = page.heading, page.about
        if only is None or name in only:
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            (to / f"{name}.qmd").write_text(page_text(page, site, index, to))
    for name, (title, about, text) in reference_pages(pages).items():
        titles[name] = title, about
        head = {"title": title, "description": about, "toc-depth": 2}
        head = yaml.safe_dump(head, sort_keys=False)
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (to / f"{name}.qmd").write_text(f"---\n{head}---\n\n{text}\n")
    config = configuration(site)
    (to / "_quarto.yml").write_text(config)
    (to / "llms.txt").write_text(llms_text(site, yaml.safe_load(config), titles))
    for p in nbs.iterdir():
        if p.suffix in (".svg", ".scss", ".png", ".html"):
            shutil.copyfile(p, to / p.name)
    return pages


def render(pages, to):
    "The site of the pages, with the text of each beside it."
    if shutil.which("quarto") is None:
        sys.exit(
            "make docs needs Quarto, which is not on this machine: install it from quarto.org, "
            "then run this again"
        )
    if subprocess.run(["quarto", "render", "--no-cache"], cwd=pages).returncode:
        sys.exit(1)
    for p in pages.rglob("*.qmd"):
        name = p.relative_to(pages).with_suffix(".html.md")
        shutil.copyfile(p, pages / "_docs" / name)
    shutil.rmtree(to, ignore_errors=True)
    shutil.move(pages / "_docs", to)


def serve(folder):
    "A rendered site on this machine: search needs a server."
    if not (folder / "index.html").is_file():
        sys.exit(f"{folder.name}: no site there; make docs renders it")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 8000), handler) as server:
        print("the site is at http://127.0.0.1:8000, until Ctrl-C")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def main(words):
    if "--serve" in words:
        return serve(ROOT / "_docs")
    shutil.rmtree(ROOT / "_proc", ignore_errors=True)
    made = make_pages(ROOT / "_proc")
    print(f"{len(made)} notebooks in _proc")
    if "--pages" not in words:
        render(ROOT / "_proc", ROOT / "_docs")


if __name__ == "__main__":
    main(sys.argv[1:])
