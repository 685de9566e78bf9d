"""Secrets planted in every place a run writes to are gone from disk and terminal.

And what comes from strangers is read, never executed.
"""

import contextlib
import gzip
import io
import json
import os
import pickle
import shutil
import tarfile
import time
import zipfile
from pathlib import Path

import nbformat
import pytest
import torch
from helpers import ROOT, codex, counts, flags, program
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from codex_nb.core.artifacts import ArtifactError
from codex_nb.core.config import ConfigError
from codex_nb.core.safety import (
    RULES,
    RedactedStream,
    find_secrets,
    looks_secret,
    redact,
    redact_notebook,
)
from codex_nb.data.corpus import CorpusConfig, open_corpus
from codex_nb.data.documents import ReadError
from codex_nb.experiments.launch import check_parameters
from codex_nb.model.model_registry import find_model, import_model, load_model, verify_model
from codex_nb.run.settings import RunConfig
from codex_nb.tracking.metrics_log import MetricsWriter, write_sample
from codex_nb.tracking.sinks import RunInfo, Sinks
from codex_nb.train.checkpoint import CheckpointError

HORSE = "correct-horse-battery"
ODD = 'it\'s "battery-sta\\ple-horse"'
WORD = "Zk8Qv3Xn7Rt2Wb5Yd9Lc4Mf6Hg1Jp0Ts"


# a run as small as it can be
SMALL = dict(steps=3, width=32, seq_len=32, batch_size=2, eval_documents=1)
SMALL |= dict(max_documents=4, max_new_tokens=4, resamples=100)


def planted(i):
    """Kind -> a text that holds a secret, and the part that may not survive.

    They are put together here, so that this file holds none.
    """
    w = f"{i:02}{WORD}{WORD}"
    return {
        "github": ("gh" + "p_" + w[:36],) * 2,
        "aws id": ("AK" + "IA" + w[:16].upper(),) * 2,
        "google": ("AI" + "za" + w[:35],) * 2,
        "anthropic": ("sk-" + "ant-" + w[:40],) * 2,
        "openai": ("s" + "k-" + w[:40],) * 2,
        "hugging face": ("h" + "f_" + w[:34],) * 2,
        "slack": ("xo" + "xb-" + w[:30],) * 2,
        "stripe": ("sk" + "_live_" + w[:24],) * 2,
        "npm": ("np" + "m_" + w[:36],) * 2,
        "gitlab": ("gl" + "pat-" + w[:20],) * 2,
        "pypi": ("py" + "pi-" + w[:60],) * 2,
        "jwt": ("ey" + "J" + w[:20] + "." + w[:30] + "." + w[:30],) * 2,
        "bearer": ("Authorization: Bear" + f"er {w[:32]}", w[:32]),
        "url": ("postgres://me:" + w[:12] + "@db.example/x", w[:12]),
        "password": ("pass" + f"word = '{w[:14]}'", w[:14]),
        "private key": (
            "-----BEGIN " + "PRIVATE KEY-----\n" + w[:60] + "\n-----END " + "PRIVATE KEY-----",
            w[:60],
        ),
        "aws secret": ("aws_sec" + f"ret_access_key = {(w + w)[:40]}", (w + w)[:40]),
        "thrown by dice": ("CLIENT_SEC" + f"RET={w[:28]}", w[:28]),
        "environment": (f"it is {os.environ.get('PLANTED_PASSWORD', HORSE)}", HORSE),
        "named key": ("api_key" + f': "{w[:18]}"', w[:18]),
    }


KINDS = list(planted(0))


def left_over(text, i):
    return [k for k, (_, secret) in planted(i).items() if secret in text]


def everything(folder):
    return "\n".join(
        p.read_bytes().decode("utf-8", "replace")
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file()
    )


def test_twenty_kinds_are_planted():
    assert (
        len(KINDS) == 20 and sum(len(left_over(text, 0)) for text, _ in planted(0).values()) >= 20
    )


def test_no_secret_of_a_notebook_is_left_in_its_run_or_on_the_terminal(tmp_path):
    "They are in its cells, outputs and metadata, and in the error that it ends with."
    nb = nbformat.read(ROOT / "nbs" / "train.ipynb", 4)
    said = "\n".join(t for t, _ in planted(1).values())
    source = f"secrets = {[t for t, _ in planted(2).values()]!r}"
    source += "\nfor s in secrets: print(s)\nsecrets[-1]"
    # a value as Python shows it, and a token in two writes
    source += "\nimport os, sys\nprint([os.environ['ODD_PWD']], repr(repr(os.environ['ODD_PWD'])))"
    source += "\nfor part in (secrets[0][:20], secrets[0][20:]):"
    source += "\n    sys.stdout.write(part)\n    sys.stdout.flush()\nos.environ['ODD_PWD']"
    nb.cells.append(nbformat.v4.new_code_cell(source))
    nb.cells.append(nbformat.v4.new_markdown_cell(said))
    nb.cells.append(nbformat.v4.new_code_cell("raise RuntimeError('\\n'.join(secrets))"))
    nb.metadata["notes"] = [t for t, _ in planted(3).values()]
    nb.cells[-1].metadata["notes"] = {"nested": [t for t, _ in planted(3).values()]}
    nb.cells[-2].source += "\n" + "\n".join(t for t, _ in planted(4).values())
    # the run still goes on when the error comes
    nb.cells = [c for c in nb.cells if "finish(run)" not in c.source]
    (tmp_path / "mine").mkdir()
    nbformat.write(nb, tmp_path / "mine" / "train.ipynb")
    folder, words = tmp_path / "runs" / "r", ["run", tmp_path / "mine" / "train.ipynb"]
    words += [*flags(SMALL), "--folder", folder]
    done = codex(*words, home=tmp_path, PLANTED_PASSWORD=HORSE, ODD_PWD=ODD)
    assert done.returncode == 1, done.stderr
    assert json.loads((folder / "manifest.json").read_text())["meta"]["status"] == "failed"
    kept = everything(tmp_path / "runs")
    assert kept.count("[redacted ") > 100 and "RuntimeError" in kept  # they were there
    for i in (1, 2, 3, 4):
        assert not left_over(kept, i), i
    for i in (1, 2, 3, 4):  # what was echoed while it ran, and the error
        assert not left_over(done.stdout + done.stderr, i), i
    for part in ("battery-sta", "ple-horse"):
        assert part not in kept + done.stdout + done.stderr
    assert "[redacted environment]" in kept and "[redacted environment]" in done.stdout


def test_secrets_as_parameters_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PLANTED_PASSWORD", HORSE)
    for kind, (text, secret) in planted(5).items():
        with pytest.raises(ConfigError) as e:
            check_parameters(RunConfig, {"data": text})
        assert "environment variable" in str(e.value) and secret not in str(e.value), kind
    text, secret = planted(6)["github"]
    done = codex("run", "train", "-p", "data", text, home=tmp_path)
    assert done.returncode == 1 and secret not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


def letters(n, alphabet="Zk8Qv3Xn7Rt2Wb5Yd9Lc4Mf6Hg1Jp0Ts"):
    return (alphabet * (n // len(alphabet) + 1))[:n]


def hexes(n):
    return letters(n, "9f86d081884c7d65")


def upper(n):
    return letters(n).upper()


UUID = "-".join(hexes(n) for n in (8, 4, 4, 4, 12))

# kind -> prefixes and what follows them; they are put together in the tests
TOKENS = {
    "aws-key-id": [("AKIA", upper(16)), ("ASIA", upper(16)), ("ABIA", upper(16))],
    "github-token": [("ghp_", letters(36)), ("ghs_", letters(36)), ("github_pat_", letters(82))],
    "gitlab-token": [("glpat-", letters(20)), ("glrt-", letters(20)), ("gldt-", letters(20))],
    "slack-token": [
        ("xoxb-", f"{'123456789012'}-{'210987654321'}-{letters(24)}"),
        ("xapp-1-", f"{upper(11)}-{'1234567890123'}-{hexes(64)}"),
        ("xoxe.xoxp-1-", letters(160)),
        ("hooks.slack.com/services/", f"T{upper(8)}/B{upper(8)}/{letters(24)}"),
    ],
    "google-key": [("AIza", letters(35)), ("GOCSPX-", letters(28)), ("ya29.", letters(60))],
    "anthropic-key": [("sk-ant-api03-", letters(93))],
    "openai-key": [("sk-proj-", letters(74)), ("sk-", letters(48))],
    "huggingface-token": [("hf_", letters(34)), ("api_org_", letters(34))],
    "stripe-key": [("sk_live_", letters(24)), ("rk_prod_", letters(24)), ("whsec_", letters(32))],
    "pypi-token": [("pypi-", letters(80))],
    "npm-token": [("npm_", letters(36))],
    "sendgrid-key": [("SG.", f"{letters(22)}.{letters(43)}")],
    "hashicorp-token": [("hvs.", letters(90)), ("hvb.", letters(138)), ("s.", letters(24))],
    "terraform-token": [(letters(14), f".atlasv1.{letters(67)}")],
    "databricks-token": [("dapi", hexes(32))],
    "age-key": [("AGE-SECRET-KEY-1", upper(58))],
    "jwt": [("eyJ", f"{letters(30)}.{letters(40)}.{letters(30)}")],
    "azure-secret": [("abc8Q~", letters(34))],
    "teams-webhook": [
        ("https://x.webhook.office.com/", f"webhookb2/{UUID}@{UUID}/IncomingWebhook/{hexes(32)}")
    ],
    "maxmind-key": [(letters(6), f"_{letters(29)}_mmk")],
    "telegram-token": [("1234567890", f":AA{letters(33)}")],
    "mailchimp-key": [("", f"{hexes(32)}-us18")],
    "facebook-token": [("123456789012345|", letters(27))],
    "service-token": [
        ("A3-", "-".join(upper(n) for n in (6, 11, 5, 5, 5))),
        ("p8e-", letters(32)),
        ("LTAI", letters(20)),
        ("ATATT3", letters(186)),
        ("CLOJARS_", letters(60)),
        ("dop_v1_", hexes(64)),
        ("dp.pt.", letters(43)),
        ("dt0c01.", f"{letters(24)}.{letters(64)}"),
        ("fm2_", letters(120)),
        ("glc_", letters(40)),
        ("glsa_", f"{letters(32)}_{hexes(8)}"),
        ("HRKU-AA", letters(58)),
        ("lin_api_", letters(40)),
        ("NRAK-", upper(27)),
        ("ntn_", letters(46)),
        ("pplx-", letters(48)),
        ("pscale_pw_", letters(43)),
        ("PMAK-", f"{hexes(24)}-{hexes(34)}"),
        ("pul-", hexes(40)),
        ("rubygems_", hexes(48)),
        ("xkeysib-", f"{hexes(64)}-{letters(16)}"),
        ("sntryu_", hexes(64)),
        ("shpat_", hexes(32)),
        ("shippo_live_", hexes(40)),
        ("sq0atp-", letters(22)),
        ("SK", hexes(32)),
        ("tfp_", letters(59)),
        ("dckr_pat_", letters(27)),
        ("gsk_", letters(52)),
        ("nvapi-", letters(64)),
        ("r8_", letters(37)),
        ("lsv2_pt_", f"{hexes(32)}_{hexes(10)}"),
    ],
}
# kind -> what stands around a secret, and the secret; without `~`, which keeps this file clean
AROUND = {
    "high-entropy": [
        ("service.t~oken = {}", letters(24)),
        ("G~ITHUB_PAT={}", letters(24)),
        ("S~TRIPE_KEY: '{}'", letters(24)),
        ('session_cookie => "{}"', letters(24)),
        ("<apiToken>\n    {}\n</apiToken>", letters(24)),
        ("os.environ['X_T~OKEN'] = '{}'", letters(24)),
        ('setProperty("X_T~OKEN", "{}")', letters(24)),
        ("x_t~oken: |\n  {}\n", letters(24)),
        ('{{"name": "X_T~OKEN", "value": "{}"}}', letters(24)),
        ("t~oken ::= `{}`", UUID),
    ],
    "assigned-secret": [
        ("p~assword = 'open {}'", "sesame-for-me"),
        ('{{\\"db_passwd\\": \\"{}\\"}}', "sesame for me"),
        ('var apiKey string = "{}"', "sesame-for-me"),
        ("s~ecret = 'it\\'s {}'", "sesame for me"),
    ],
    "unquoted-secret": [
        ("export DB_P~ASSWORD={}", "hunter22x"),
        ("p~assword: {}", "hunter22x"),
        ("os.getenv('DB_P~ASSPHRASE', '{}')", "hunter22x"),
        ("a~pi_key={}&page=2", "hunter22x!"),
        ("MYSQL_P~WD={}", "hunter22x"),
        ("SMTP_P~ASS = {}", "Tr0ub4dor&3"),
    ],
    "bearer-token": [("B~earer {}", letters(30))],
    "basic-auth": [("B~asic {}", "bWU6b3BlbiBzZXNhbWU=")],
    "authorization": [
        ("A~uthorization: Token {}", letters(30)),
        ("{{'A~uthorization': '{}'}}", UUID),
        ("a~uthorization: ApiKey {}", letters(30)),
    ],
    "curl-user": [
        ("c~url -u {} https://example.org", "me:open-sesame"),
        ("c~url -s \\\n  --user '{}' https://example.org", "me:open-sesame"),
    ],
    "url-parameter": [
        ("https://example.org/v1?a~pi_key={}&page=2", "opensesame"),
        ("GET /x?page=2&access_t~oken={} HTTP/1.1", "opensesame"),
    ],
    "url-password": [("postgres://me:{}@db.example/x", "opensesame")],
    "aws-secret": [("aws_s~ecret_access_key = {}", letters(40))],
    "private-key": [
        ("-----BEGIN RSA {0}\n{{}}\n-----END RSA {0}".format("P~RIVATE KEY-----"), letters(64))
    ],
}
ROWS = [
    (kind, f"a {prefix}{rest} b\n", rest) for kind, rows in TOKENS.items() for prefix, rest in rows
] + [
    (kind, f"a\n{text.replace('~', '').format(secret)}\nb\n", secret)
    for kind, rows in AROUND.items()
    for text, secret in rows
]


def test_every_kind_has_a_row():
    assert {rule.kind for rule in RULES} == TOKENS.keys() | AROUND.keys() and len(ROWS) > 100


@pytest.mark.parametrize("kind", [*TOKENS, *AROUND])
def test_kinds_of_secrets(kind):
    for _, text, secret in [row for row in ROWS if row[0] == kind]:
        clean = redact(text, {})
        assert secret[-9:] not in clean and kind in {f.kind for f in find_secrets(text, {})}, text
        assert clean.startswith("a") and clean.endswith("b\n") and redact(clean, {}) == clean, text


def test_kinds_of_secrets_inside_of_texts():
    "As Python and JSON show them, once and twice."
    for kind, text, secret in ROWS:
        if "'" in secret or "\\" in text:
            continue
        text = text.replace("a ", "a\n", 1)
        for shown in (
            repr(text),
            json.dumps({"x": text}),
            repr([text, "'"]),
            json.dumps([repr(text)]),
        ):
            assert secret[-9:] not in redact(shown, {}), (kind, shown)


ORDINARY = """
password: str
password = config.password
password = getpass.getpass('password: ')
def login(user, password=None, token=None): return user.token == token
login(password=password, token=os.environ['TOKEN'])
secret = random_secret(16)
token = tokenizer.pad_token_id
eos_token: <|endoftext|>
token_ids = [50256, 1, 2]
max_tokens=1000000000000, tokens_per_second: 123456.789
primary_key = 'user_id_2026_01', sort_key="created_at_2026"
api_key = "${API_KEY}", secret: {{ vault.secret }}, password = "********"
api_key = "your-api-key", token = "hf_...", password="password"
https://example.org:8080/path?page=2&key=1, git@example.org:me/repo.git
Basic understanding of the Bearer of a token; Authorization: required
sha256:9f86d081884c7d659f86d081884c7d659f86d081884c7d659f86d081884c7d65
-----BEGIN CERTIFICATE-----
curl -u "$USER:$PASSWORD" https://example.org
task-force-of-the-twenty-first-century sk-learn, risk-averse
test_a_long_name_of_a_function_with_2_digits_and_more
"""


def test_ordinary_text_is_left_alone():
    assert [line for line in ORDINARY.splitlines() if redact(line, {}) != line] == []
    assert redact(ORDINARY, {}) == ORDINARY


def in_pieces(text, cuts, environ=None):
    stream, ends = RedactedStream(environ or {}), [*cuts, len(text)]
    return [stream.write(text[a:b]) for a, b in zip([0, *ends], ends)] + [stream.close()]


def test_secrets_in_two_writes():
    for kind, text, secret in ROWS:
        at = text.index(secret)
        for cuts in ([at + len(secret) // 2], [at + len(secret) - 1], range(1, len(text), 3)):
            shown = "".join(in_pieces(text, cuts))
            left = max(
                (
                    n
                    for n in range(8, len(secret) + 1)
                    if secret[:n] in shown or secret[-n:] in shown
                ),
                default=0,
            )
            # The beginning of a few kinds tells nothing yet.
            late = {"maxmind-key": 9, "mailchimp-key": 11}
            assert left <= late.get(kind, 7), (kind, text, [*cuts], shown)
            assert shown.startswith("a") and shown.endswith("b\n"), (kind, shown)
    for odd in (HORSE, ODD):
        for shown in (odd, repr([odd])):
            text = f"it is {shown}.\n"
            for cut in range(1, len(text), 2):
                clean = "".join(in_pieces(text, [cut], {"MY_PWD": odd}))
                assert clean.count("[redacted environment]") == 1 and "horse" not in clean, clean


@settings(max_examples=counts(60, 2000), deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [*ORDINARY.split("\n"), " ", "\n", "\r", "token", "=", "gh" + "p_", "'", "-----B"]
        )
        | st.text(max_size=8),
        max_size=12,
    )
)
def test_pieces_lose_nothing(pieces):
    stream = RedactedStream({"MY_PWD": HORSE})
    shown = "".join([*map(stream.write, pieces), stream.close()])
    text = "".join(pieces)
    assert shown == text or redact(text, {}) != text


def test_what_cannot_grow_is_shown_at_once():
    stream = RedactedStream({})
    for piece in (
        "\r 30%|### | 3/10 [00:01<00:02, 2.5it/s]",
        "step 3 loss 1.25",
        "\n",
        "12 tokens/s ",
    ):
        assert stream.write(piece) == piece
    begin = "-----BEGIN " + "PRIVATE KEY-----\n"
    assert stream.write(begin) == ""
    for _ in range(300):  # more than is held back
        assert stream.write(letters(64) + "\n") == ""
    assert len(stream._held) < 15_000
    shown = stream.write("-----END " + "PRIVATE KEY-----\nnext\n")
    assert shown == "[redacted private-key]\nnext\n" and stream.close() == ""


def test_names_of_variables():
    telling = """HF_TOKEN DB_PASSWORD MYSQL_PWD GPG_PASSPHRASE GITHUB_PAT SESSION_COOKIE STRIPE_KEY
        SMTP_PASS AWS_SECRET_ACCESS_KEY OPENAI_API_KEY REDIS_AUTH SENTRY_DSN dbPwd api_key cookie"""
    other = """PWD OLDPWD PATH SSH_AUTH_SOCK HOME max_tokens eos_token sort_key PUBLIC_KEY pattern
        compass_x author keyboard n_tokens tokenizer data/tokens.py"""
    assert [n for n in telling.split() if not looks_secret(n)] == []
    assert [n for n in other.split() if looks_secret(n)] == []
    for name in ("MY_PWD", "MY_PASSPHRASE", "MY_PAT", "MY_COOKIE", "STRIPE_KEY"):
        nb = {"cells": [{"outputs": [{"data": {"text/plain": repr([ODD, "x"])}}]}]}
        clean = json.dumps(redact_json_with(nb, {name: ODD}))
        assert "horse" not in clean and "[redacted environment]" in clean


def redact_json_with(nb, environ):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environ.items():
            patch.setenv(name, value)
        return redact_notebook(nb)


@pytest.mark.parametrize("function", ["redact", "stream"])
def test_time_grows_with_the_length(function):
    hostile = ["eyJ" + "a.", "eyJ-", "pass" + "word=", "pass" + "word='", "pass" + "word=\\'"]
    hostile += ["token=a1", "a.", "?key=", "://a:", "curl -u ", "-----BEGIN A ", "s.", "bearer "]
    hostile += ["-----BEGIN PRIVATE " + "KEY-----", "secret: |\n ", "{{"]
    if function == "redact":
        hostile += [hint for rule in RULES for hint in rule.hints[:1] if hint]

    def seconds(n):
        best = []
        for unit in hostile:
            times = []
            for trial in "12":  # another text each time: what was found is kept
                text = f"{trial} {unit * (n // len(unit) + 1)}"[:n]
                begun = time.process_time()
                if function == "redact":
                    find_secrets(text, {})
                else:
                    stream = RedactedStream({})
                    for at in range(0, n, n // 8):
                        stream.write(text[at : at + n // 8])
                    stream.close()
                times.append(time.process_time() - begun)
            best.append(min(times))
        return best

    short, long = seconds(4_000), seconds(32_000)
    assert sum(long) < 16 * sum(short) + 0.3, (sum(short), sum(long))
    slow = {u: (a, b) for u, a, b in zip(hostile, short, long) if b > 24 * a + 0.05}
    assert not slow


@pytest.mark.parametrize("name", ["mlflow", "tensorboard", "wandb", "csv"])
def test_no_secret_reaches_a_sink(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PLANTED_PASSWORD", HORSE)
    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "runs" / "r"
    folder.mkdir(parents=True)
    w = MetricsWriter(folder / "metrics.ndjson")
    for i, (text, _) in enumerate(planted(7).values()):
        # MLflow has rules for the names of metrics
        w.write(i, {"loss": 1.0} | ({text: 2.0} if name != "mlflow" else {}))
        write_sample(folder / "samples.ndjson", i, text)
    w.close()
    sinks = Sinks(
        RunInfo(
            folder,
            {f"p{i}": t for i, (t, _) in enumerate(planted(7).values())},
            {f"t{i}": t for i, (t, _) in enumerate(planted(7).values())},
            {f"p{i}": t for i, (t, _) in enumerate(planted(7).values())},
        ),
        [name],
    )
    broken = sinks.finish("FINISHED", [folder / "samples.ndjson"])
    assert not broken
    assert len(everything(tmp_path)) > 3000 and not left_over(everything(tmp_path), 7)


def command(monkeypatch, capsys, *words, stdin=""):  # in this process, which is quicker
    from codex_nb.cli.main import main

    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
    with contextlib.suppress(SystemExit):
        main([*words])
    said = capsys.readouterr()
    return said.out + said.err


MARK = "executed"


class Evil:
    def __init__(self, where):
        self.where = str(where)

    def __reduce__(self):
        return Path.write_text, (Path(self.where), MARK)


def pickled(f, mark):
    (f / "model.safetensors").unlink()
    (f / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(mark)))


def disguised(f, mark):
    (f / "model.safetensors").write_bytes(pickle.dumps(Evil(mark)))


def torch_zip(f, mark):
    torch.save(Evil(mark), f / "model.safetensors")


def beside(f, mark):
    (f / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(mark)))
    (f / "training_args.bin").write_bytes(pickle.dumps(Evil(mark)))
    (f / "optimizer.pt").write_bytes(pickle.dumps(Evil(mark)))


def auto_map(f, mark):
    (f / "modeling_evil.py").write_text(
        f"from pathlib import Path\n"
        f"Path({str(mark)!r}).write_text({MARK!r})\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class C(LlamaConfig): pass\n"
        "class M(LlamaForCausalLM): pass\n"
    )
    config = json.loads((f / "config.json").read_text())
    (f / "config.json").write_text(
        json.dumps(
            config
            | {
                "model_type": "evil",
                "auto_map": {
                    "AutoConfig": "modeling_evil.C",
                    "AutoModelForCausalLM": "modeling_evil.M",
                },
            }
        )
    )


def auto_map_known(f, mark):
    auto_map(f, mark)
    (f / "config.json").write_text(
        (f / "config.json").read_text().replace('"model_type": "evil"', '"model_type": "llama"')
    )


def auto_tokenizer(f, mark):
    (f / "tokenization_evil.py").write_text(
        f"from pathlib import Path\nPath({str(mark)!r}).write_text({MARK!r})\n"
    )
    (f / "tokenizer_config.json").write_text(
        json.dumps(
            json.loads((f / "tokenizer_config.json").read_text())
            | {
                "tokenizer_class": "Evil",
                "auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]},
            }
        )
    )


def index_outside(f, mark):
    shutil.move(f / "model.safetensors", f.parent / "outside.safetensors")
    save_file({"x": torch.zeros(1)}, f / "other.safetensors")
    (f / "model.safetensors.index.json").write_text(
        json.dumps(
            {
                "metadata": {},
                "weight_map": {
                    "model.embed_tokens.weight": "../outside.safetensors",
                    "lm_head.weight": "/etc/passwd",
                },
            }
        )
    )


def template(f, mark):
    subclasses = "().__class__.__base__.__subclasses__()"
    opened = f"x.__init__.__globals__['__builtins__']['open']('{mark}', 'w')"
    (f / "chat_template.jinja").write_text(
        "{{ ''.__class__.__mro__[1].__subclasses__() }}"
        f"{{% for x in {subclasses} %}}{{{{ {opened}.write('{MARK}') }}}}{{% endfor %}}"
    )


def link_outside(f, mark):
    (f / "model.safetensors").rename(f.parent / "w.safetensors")
    (f / "model.safetensors").symlink_to(f.parent / "w.safetensors")
    (f / "special_tokens_map.json").symlink_to("/etc/passwd")


@pytest.mark.parametrize(
    "make",
    [
        pickled,
        disguised,
        torch_zip,
        beside,
        auto_map,
        auto_map_known,
        auto_tokenizer,
        index_outside,
        template,
        link_outside,
    ],
    ids=lambda m: m.__name__,
)
def test_model_of_a_stranger_executes_nothing(make, small_model, tmp_path, monkeypatch, capsys):
    "Opened, imported, verified, used; and nothing outside its folder is read or written."
    mark, folder = tmp_path / "mark", tmp_path / "in" / "m"
    shutil.copytree(small_model, folder)
    make(folder, mark)
    monkeypatch.setenv("CODEX_NB_MODELS", str(tmp_path / "models"))
    for what in (
        lambda: load_model(find_model(str(folder))),
        lambda: import_model(folder),
        lambda: verify_model(folder),
    ):
        try:
            what()
        except (ArtifactError, ConfigError, OSError, ValueError, KeyError, RuntimeError):
            continue  # refused is fine; `mark` is what counts
    for words in (
        ["generate", str(folder), "-p", "max_new_tokens=2", "--device", "cpu"],
        ["chat", str(folder), "-p", "max_new_tokens=2", "--device", "cpu"],
    ):
        said = command(monkeypatch, capsys, *words, stdin="Who is there?\n")
        assert not mark.exists() and "Traceback" not in said and "root:" not in said, said
    said = everything(tmp_path / "models") if (tmp_path / "models").exists() else ""
    assert "root:x" not in said


def test_pickles_in_a_checkpoint_are_not_opened(tmp_path, small_model):
    "Files that other tools would open: a sharded checkpoint's metadata, an optimizer."
    from codex_nb.core.artifacts import seal

    mark, folder = tmp_path / "mark", tmp_path / "step-00000001"
    shutil.copytree(small_model, folder)
    for n in (".metadata", "optimizer.pt", "__0_0.distcp", "rng.pkl"):
        (folder / n).write_bytes(pickle.dumps(Evil(mark)))
    (folder / "state.json").write_bytes(pickle.dumps(Evil(mark)))
    from codex_nb.train.checkpoint import ResumeMetadata, load_checkpoint
    from codex_nb.train.optim import OptimConfig, make_optimizer

    m = load_model(small_model).train()
    for sealed in (False, True):
        if sealed:
            seal(folder, "checkpoint", {}, {}, {})
        with pytest.raises((ArtifactError, CheckpointError, ValueError)):
            load_checkpoint(
                folder, m, make_optimizer(m, OptimConfig()), ResumeMetadata({}, {}, {}, {}, {})
            )
    assert not mark.exists()


def archive(path, names):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as z:
            for n in names:
                z.writestr(n, "x")
    else:
        with tarfile.open(path, "w:gz") as t:
            for n in names:
                i = tarfile.TarInfo(n)
                i.size = 1
                t.addfile(i, io.BytesIO(b"x"))
            link = tarfile.TarInfo("link")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            t.addfile(link)


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.txt.zip"])
def test_archives_are_not_unpacked(name, tmp_path, monkeypatch):
    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path / "home"))
    folder = tmp_path / "data"
    folder.mkdir()
    archive(folder / name, ["../../outside.txt", "/tmp/outside-codex-nb.txt", "inside.txt"])
    for i in range(60):
        (folder / f"{i}.txt").write_text(f"text {i}")
    for data in (folder / name, folder):
        try:
            corpus = open_corpus(CorpusConfig(data=str(data)))
        except ReadError:
            continue
        assert len(corpus) == 60  # the others alone
    assert (
        not (tmp_path / "outside.txt").exists()
        and not Path("/tmp/outside-codex-nb.txt").exists()
        and sorted(p.name for p in tmp_path.iterdir()) in (["data"], ["data", "home"])
    )


def test_decompression_bomb_does_not_fill_the_memory(tmp_path):
    "A gigabyte of one letter in a megabyte, in one line: refused by its length, in little memory."
    with gzip.open(tmp_path / "bomb.jsonl.gz", "wb", compresslevel=9) as f:
        f.write(b'{"text": "')
        for _ in range(1024):
            f.write(b"a" * (1 << 20))
        f.write(b'"}\n')
    done = program("read_bomb.py", tmp_path / "bomb.jsonl.gz", home=tmp_path, fresh=True)
    said, grown = done.stdout.strip().splitlines()
    assert "longer than" in said or "MiB" in said, done.stdout + done.stderr
    assert int(grown) < 200, grown


def test_run_folder_of_a_stranger_executes_nothing(tmp_path, monkeypatch, capsys):
    "Its notebook is a program, its names point outside, its records are none."
    mark, folder = tmp_path / "mark", tmp_path / "runs" / "theirs"
    words = ["run", "train", *flags(SMALL), "--folder", folder, "--quiet"]
    done = codex(*words, home=tmp_path)
    assert done.returncode == 0, done.stderr
    nb = nbformat.read(folder / "train.ipynb", 4)
    nb.cells.insert(
        0,
        nbformat.v4.new_code_cell(
            f"from pathlib import Path\nPath({str(mark)!r}).write_text({MARK!r})"
        ),
    )
    nb.metadata["kernelspec"] = {
        "name": f"; touch {mark}",
        "display_name": "x",
        "language": "python",
    }
    nbformat.write(nb, folder / "train.ipynb")
    said = json.loads((folder / "manifest.json").read_text())
    said["files"]["../../outside.txt"] = {"bytes": 1, "sha256": "0" * 64}
    (tmp_path / "outside.txt").write_text("x")
    (folder / "samples.ndjson").write_text('{"step": 1, "text": "<script>alert(1)</script>"}\n')
    (folder / "manifest.json").write_text(json.dumps(said))
    (folder / "weights.pt").write_bytes(pickle.dumps(Evil(mark)))
    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    for words in (
        ["verify", "theirs"],
        ["runs"],
        ["diff", "theirs", "theirs", "--html", str(tmp_path / "page.html")],
        ["export", "theirs", "--to", "csv"],
        ["generate", "theirs", "-p", "max_new_tokens=2"],
        ["leaderboard", "theirs"],
        ["replay", "theirs", "--steps", "1", "--quiet"],
    ):
        said = command(monkeypatch, capsys, *words)
        assert "Traceback" not in said and not mark.exists(), (words, said)
    assert "L0 does not hold" in command(monkeypatch, capsys, "verify", "theirs")
    page = tmp_path / "page.html"
    assert not page.exists() or "<script>" not in page.read_text()
    assert (tmp_path / "outside.txt").read_text() == "x"
