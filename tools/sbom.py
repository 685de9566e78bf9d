"""`make sbom`: what this package is made of, from the lock.

It writes dist/sbom.cdx.json (CycloneDX 1.6) and dist/licences.md.
"""

import re
import subprocess
import sys
import uuid
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentScope, ComponentType
from cyclonedx.model.license import DisjunctiveLicense
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
from lock import TORCH, locked  # noqa: E402

from codex_nb import __version__  # noqa: E402
from codex_nb.core.repro import plain_name  # noqa: E402
from codex_nb.deploy.bundle import needed_packages  # noqa: E402

# what may be installed beside Apache-2.0 code without asking anybody
FINE = re.compile(
    r"MIT|BSD|Apache|ISC|PSF|Python Software Foundation|MPL|Mozilla|Unlicense|CC0|Zlib|HPND|0BSD"
    r"|LGPL|Lesser General|Public Domain|CNRI"
)
# read in the files of those that do not say it where others do
SAID_ELSEWHERE = {"huey": "MIT", "skops": "MIT"}


def licence(name):
    "What a distribution says of its licence; None when it is not installed here."
    try:
        m = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return None
    said = m.get("License-Expression") or " / ".join(
        c.rpartition(" :: ")[2] for c in m.get_all("Classifier") or [] if c.startswith("License ::")
    )
    if said in ("", "OSI Approved"):
        said = (m.get("License") or "").strip().split("\n")[0][:80]
    return SAID_ELSEWHERE.get(plain_name(name)) or said or "?"


def extras():
    "Names of what users may ask for: all but `dev`."
    return tuple(sorted(set(metadata.metadata("codex_nb").get_all("Provides-Extra")) - {"dev"}))


def parts():
    "(name, version, scope, hashes, licence) of every package in the lock, and torch; sorted."
    plain, more = needed_packages(), needed_packages(extras())

    def scope(n):
        return "required" if n in plain else "optional" if n in more else "excluded"

    rows = {}
    for r, hashes in locked():
        name, version = plain_name(r.name), next(s.version for s in r.specifier)
        rows[name, version] = (
            name,
            version,
            scope(name),
            sorted({*hashes, *(rows[name, version][3] if (name, version) in rows else [])}),
            licence(name),
        )
    return sorted([*rows.values(), ("torch", TORCH, "required", [], licence("torch"))])


def when():
    return datetime.fromtimestamp(
        int(
            subprocess.run(
                ["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True
            ).stdout
            or 0
        ),
        UTC,
    )


def make(rows):
    "The bill of materials as JSON; the same lock and commit give the same text."
    bom = Bom(
        serial_number=uuid.uuid5(uuid.NAMESPACE_URL, "\n".join(f"{n}=={v}" for n, v, *_ in rows))
    )
    bom.metadata.timestamp = when()
    bom.metadata.component = Component(
        name="codex_nb",
        version=__version__,
        type=ComponentType.LIBRARY,
        purl=PackageURL("pypi", None, "codex-nb", __version__),
        bom_ref="codex_nb",
    )
    scopes = {
        "required": ComponentScope.REQUIRED,
        "optional": ComponentScope.OPTIONAL,
        "excluded": ComponentScope.EXCLUDED,
    }
    for name, version, scope, hashes, said in rows:
        purl = PackageURL("pypi", None, name, version)
        bom.components.add(
            Component(
                name=name,
                version=version,
                type=ComponentType.LIBRARY,
                purl=purl,
                bom_ref=str(purl),
                scope=scopes[scope],
                hashes=[HashType(alg=HashAlgorithm.SHA_256, content=h) for h in hashes],
                licenses=[DisjunctiveLicense(name=said)] if said else [],
            )
        )
    bom.register_dependency(
        bom.metadata.component, [c for c in bom.components if c.scope == ComponentScope.REQUIRED]
    )
    return JsonV1Dot6(bom).output_as_string(indent=1) + "\n"


def table(rows):
    "The licences as Markdown."
    words = {"required": "needed", "optional": "extras", "excluded": "development"}
    head = (
        "# Licences of what is installed\n\nMade from `requirements.lock`. Scope `needed`: in "
        "every installation; `extras`: where asked for; "
        "`development`: only to change the package.\n\n"
        "| package | version | scope | licence |\n|---|---|---|---|\n"
    )
    return head + "".join(
        f"| {name} | {version} | {words[scope]} | {licence or 'not for this platform'} |\n"
        for name, version, scope, _, licence in rows
    )


def doubts(rows):
    return [
        f"{name} {version}: {licence}"
        for name, version, scope, _, licence in rows
        if scope != "excluded" and licence is not None and not FINE.search(licence)
    ]


def main():
    rows = parts()
    text = make(rows)
    if wrong := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text):
        sys.exit(f"sbom: not CycloneDX 1.6: {wrong}")
    (ROOT / "dist").mkdir(exist_ok=True)
    (ROOT / "dist" / "sbom.cdx.json").write_text(text)
    (ROOT / "dist" / "licences.md").write_text(table(rows))
    needed = sum(r[2] == "required" for r in rows)
    print(f"dist/sbom.cdx.json, dist/licences.md: {len(rows)} packages, {needed} of them needed")
    if found := doubts(rows):
        sys.exit("to be looked at: " + "; ".join(found))


if __name__ == "__main__":
    main()
