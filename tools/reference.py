"""Pages of the site that are made from the package: settings, commands, files, names.

Each is made by executing what it describes, so it cannot say anything else. `tools/docs.py` puts
them between the notebooks.
"""

import json
import re
import tempfile
from pathlib import Path

BY_HAND = {  # exit codes that no table of the package names
    0: "done",
    1: "wrong input, or an error",
    2: "a wrong command line",
    3: "stopped by a guard: a loss that is not finite, or spikes",
}


def cell(value):
    "A value in a Markdown table."
    return str(value).replace("|", "\\|").replace("\n", " ").replace("<", "\\<")


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def code(value):
    "A value as it is typed; empty for none."
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return f"`{cell(text)}`" if text else "`''`"


def all_settings():
    "Section -> setting -> kind of run -> what is known of it."
    from codex_nb.run.setting_table import setting_table
    from codex_nb.run.settings import KINDS

    found = {}
    for kind, cls in KINDS.items():
        for info in setting_table(cls):
            found.setdefault(info.section, {}).setdefault(info.name, {})[kind] = info
    return found


def setting_entry(name, anchor, kinds):
    "One setting: its meaning, and a line for each kind of run that takes it."
    first = next(iter(kinds.values()))
    lines = [f"### `{name}` {{#{anchor}}}", first.meaning + "."]
    lines[1] = re.sub(r"[.]{2,}$", ".", lines[1])
    rows = {}  # what is the same for several kinds of run is said once
    for kind, info in kinds.items():
        presets = ", ".join(f"{p} {code(v)}" for p, v in info.presets.items())
        row = (f"`{cell(info.type)}`", code(info.default) or "not given", presets)
        rows.setdefault(row, []).append(kind)
    lines.append(
        table(
            ["run", "type and range", "default", "presets"],
            [[", ".join(kinds), *row] for row, kinds in rows.items()],
        )
    )
    notes = [info.meaning + "." for info in kinds.values() if info.meaning != first.meaning]
    notes += [] if first.in_digest else ["The result is the same for every value."]
    notes += [f"No effect {first.no_effect}."] if first.no_effect else []
    if first.also_called:
        notes.append("In other tools: " + ", ".join(map(code, first.also_called)) + ".")
    if first.renamed_from:
        notes.append("Formerly " + ", ".join(map(code, first.renamed_from)) + ".")
    return "\n\n".join([*lines, *([" ".join(dict.fromkeys(notes))] if notes else [])])


def setting_anchors(found):
    "Section and name -> anchor; a few names mean another thing in another section."
    anchors = {}
    for section, names in found.items():
        for name in names:
            anchors[section, name] = f"{section}-{name}" if name in anchors.values() else name
    return anchors


def presets_of_kinds():
    "A table of presets for each kind of run."
    from codex_nb.run.setting_table import preset_table
    from codex_nb.run.settings import KINDS

    for kind in KINDS:
        rows = preset_table(kind)
        names = [n for n in rows[0] if n != "for" and any(row.get(n) for row in rows)] + ["for"]
        values = [[row.get(n) for n in names] for row in rows]
        shown = [
            [f"{v:,}" if isinstance(v, int) else cell(v or "") for v in line] for line in values
        ]
        yield f"### {kind.capitalize()} {{#presets-{kind}}}"
        yield table(names, shown)


def settings_page():
    found = all_settings()
    anchors = setting_anchors(found)
    used = [name for _, name in anchors]
    parts = [
        "Give a setting as `NAME=VALUE`, as `-p NAME VALUE`, or in a file with `--config`. "
        "`codex-nb settings NAME` prints one of these entries, `codex-nb run train --help` those "
        "of a notebook. What no preset names has its default in it.",
        " · ".join(
            f"[`{name}`](#{anchor})" + f" ({section})" * (used.count(name) > 1)
            for (section, name), anchor in sorted(anchors.items(), key=lambda item: item[0][1])
        ),
    ]
    parts.append("## Presets {#presets}\n\nTake one with `preset=NAME`.")
    parts += presets_of_kinds()
    for section, settings in found.items():
        some = next(iter(next(iter(settings.values())).values()))
        parts.append(f"## {section} {{#section-{section}}}\n\n{some.about}")
        parts += [setting_entry(n, anchors[section, n], kinds) for n, kinds in settings.items()]
    return "\n\n".join(parts)


def command_entry(words, command, level):
    "A command with its arguments and options; a group with its commands."
    title = " ".join(words)
    rows, usage = [], [title]
    for p in command.params:
        if getattr(p, "hidden", False) or p.name == "help":
            continue
        named = [o for o in (*p.opts, *p.secondary_opts) if o.startswith("-")]
        if not named:
            shown = p.metavar or p.name.upper()
            usage.append(shown if p.required else f"[{shown}]")
        default = None if callable(p.default) or p.default in (False, None, []) else p.default
        said = cell(p.help or "") + (f" Default: {code(default)}." if default is not None else "")
        rows.append([", ".join(f"`{n}`" for n in named) or f"`{shown}`", said])
    usage += ["[OPTIONS]"] if any(r[0].startswith("`-") for r in rows) else []
    parts = [f"{'#' * level} `{title}` {{#{'-'.join(words[1:])}}}", command.help or ""]
    if not getattr(command, "commands", None):
        parts.append(f"```sh\n{' '.join(usage)}\n```")
    parts += [table(["", "meaning"], rows)] if rows else []
    for name, below in getattr(command, "commands", {}).items():
        parts.append(command_entry([*words, name], below, level + 1))
    return "\n\n".join(p for p in parts if p)


def command_tree():
    import typer

    from codex_nb.cli.main import app

    return typer.main.get_command(app)


def commands_page():
    tree = command_tree()
    groups = {}
    for name, command in tree.commands.items():
        panel = getattr(command, "rich_help_panel", None)
        groups.setdefault(panel if isinstance(panel, str) else "Others", []).append((name, command))
    parts = [
        "`codex-nb COMMAND --help` says the same. `RUN` is a run folder, the end of its name, or "
        "`last` for the newest. [Exit codes](environment.qmd#exit-codes) say how a command ended."
    ]
    for panel, commands in groups.items():
        parts.append(f"## {panel}")
        parts += [command_entry(["codex-nb", n], c, 3) for n, c in sorted(commands)]
    return "\n\n".join(parts)


def command_names(words, command):
    yield words
    for name, below in getattr(command, "commands", {}).items():
        yield from command_names([*words, name], below)


def reference_anchors():
    "Page -> what prose may name -> its anchor there."
    from codex_nb.core.config import ENVIRONMENT

    commands = [w for w in command_names(["codex-nb"], command_tree()) if w[1:]]
    return {
        "commands": {" ".join(words): "-".join(words[1:]) for words in commands},
        "settings": {f"-p {a}": a for a in setting_anchors(all_settings()).values()},
        "environment": dict.fromkeys(ENVIRONMENT, "environment-variables"),
    }


def exit_codes():
    "Code -> meaning."
    from codex_nb.train.interrupts import EXIT_CODES, RESUMABLE

    found = dict(BY_HAND)
    for name, number in RESUMABLE.items():
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
        found[number] = f"{found[number]}, {words}" if number in found else words
    return found | {number: f"interrupted by {name}" for name, number in EXIT_CODES.items()}


def environment_page():
    from codex_nb.core.config import ENVIRONMENT
    from codex_nb.train.interrupts import RESUMABLE_CODES

    variables = [[f"`{name}`", cell(text)] for name, text in ENVIRONMENT.items()]
    variables.append(
        ["`MLFLOW_TRACKING_URI`", "an MLflow server to use instead of the workspace's SQLite file"]
    )
    codes = [
        [f"`{number}`", text, "yes" if number in RESUMABLE_CODES else ""]
        for number, text in exit_codes().items()
    ]
    return "\n\n".join(
        [
            "## Environment variables",
            table(["name", "meaning"], variables),
            "## Exit codes",
            table(["code", "of `codex-nb`", "can be resumed"], codes),
        ]
    )


def example(value):
    "JSON with long lists and mappings cut, so that the keys are seen."
    if isinstance(value, dict):
        items = list(value.items())
        cut = {k: example(v) for k, v in items[:12]}
        return cut | ({"...": f"{len(items) - 12} more"} if len(items) > 12 else {})
    return value


def shown(path):
    return "```json\n" + json.dumps(example(json.loads(path.read_text())), indent=2) + "\n```"


def files_page():
    from codex_nb.core.artifacts import SCHEMA, Manifest, seal
    from codex_nb.run.run_record import RECORD_SCHEMA, RunRecord
    from codex_nb.run.settings import RunConfig
    from codex_nb.tracking.metrics_log import METRICS_SCHEMA, MetricsWriter

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        writer = MetricsWriter(folder / "metrics.ndjson")
        writer.write(10, {"loss": 2.5, "lr": 1e-3}, tokens=5120, exact={"loss": 2.5})
        writer.close()
        record = json.loads((folder / "metrics.ndjson").read_text()) | {"time": 1767225600.0}
        (folder / "record.json").write_text(json.dumps(record))
        RunRecord.of("train", RunConfig.from_preset("smoke"), folder).save(folder)
        stored = json.loads((folder / "config.json").read_text())
        stored["config"] = {"seed": 0, "optim": {"lr": 0.008}, "...": "every other setting"}
        stored["identity"] = {"seed": 0, "...": "the settings that can change the result"}
        (folder / "config.json").write_text(json.dumps(stored | {"launch_dir": "../.."}))
        (folder / "sealed").mkdir()
        (folder / "sealed" / "model.safetensors").write_bytes(b"weights")
        seal(folder / "sealed", "checkpoint", parents={"corpus": "9c2f...", "run": "4be1..."})
        manifest = json.loads((folder / "sealed" / "manifest.json").read_text())
        manifest |= {"created": "2026-01-01T00:00:00+00:00", "producer": {"version": "..."}}
        for name in ("digest", "check"):
            manifest[name] = manifest[name][:8] + "..."
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return "\n\n".join(
            [
                "Each file names the schema it is written in; what is newer than this version can "
                "read is refused. The guide on runs lists all files of "
                "[the run folder](../guides/start_a_run.qmd#the-run-folder).",
                f"## A record of metrics\n\nA line of `metrics.ndjson`, schema {METRICS_SCHEMA}. "
                "`values` are for people, `exact` for comparing: floating-point numbers in "
                "hexadecimal.",
                shown(folder / "record.json"),
                f"## The record of a run\n\n`config.json`, schema {RECORD_SCHEMA}. `identity` has "
                "what can change the result, and `digest` is its SHA-256; `sources` says where "
                "each value came from.",
                shown(folder / "config.json"),
                f"## A manifest\n\n`manifest.json` of every artifact, schema {SCHEMA}: "
                + ", ".join(f"`{name}`" for name in Manifest.__dataclass_fields__)
                + ". The digest covers kind, settings, parents and files; `check` covers the file.",
                shown(folder / "manifest.json"),
            ]
        )


def api_page(pages):
    "All public names by letter, each with the module that has it."
    letters = {}
    for page in pages.values():
        for s in page.symbols:
            letters.setdefault(s.name[0].upper(), []).append(s)
    parts = [" · ".join(f"[{letter}](#{letter.lower()})" for letter in sorted(letters))]
    for letter in sorted(letters):
        rows = [
            [f"[`{s.name}`](../{s.page.name}.qmd#{s.name})", f"`{s.page.module}`", cell(s.about)]
            for s in sorted(letters[letter], key=lambda s: (s.name.lower(), s.page.name))
        ]
        parts += [f"## {letter} {{#{letter.lower()}}}", table(["name", "module", ""], rows)]
    return "\n\n".join(parts)


def reference_pages(pages):
    "Name of a page -> title, description and text."
    return {
        "reference/settings": (
            "All settings",
            "Name, type, range, default and meaning of every setting, and what each preset says.",
            settings_page(),
        ),
        "reference/commands": (
            "All commands",
            "What `codex-nb` can do, with every argument and option.",
            commands_page(),
        ),
        "reference/environment": (
            "Environment variables and exit codes",
            "What a process is told from outside, and what it answers.",
            environment_page(),
        ),
        "reference/files": (
            "Files and their schemas",
            "The records and manifests that a run leaves.",
            files_page(),
        ),
        "reference/api": (
            "Index of the API",
            "Every public function, class and method, by letter.",
            api_page(pages),
        ),
    }
