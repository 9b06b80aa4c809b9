"""Addresses of stores: of every scheme, of servers that answer something else, with passwords."""

from __future__ import annotations

from benchmarks.hostile.case import PASSWORD, WORKS, Case, in_path, refused
from benchmarks.hostile.place import Expected
from benchmarks.hostile.reference import TUNE, WHOLE
from benchmarks.hostile.servers import ANSWERS, CLOSED, CLOSING, GARBAGE, SILENT

EITHER = WORKS | refused()
LOCAL = "http://127.0.0.1:PORT_"
SAYS = {
    "401": "401|MLFLOW_TRACKING_USERNAME",
    "403": "403|[Pp]ermission",
    "404": "404",
    "429": "429",
    "500": "500",
    "502": "502",
}
URIS: dict[str, Expected] = {
    f"{LOCAL}{CLOSED}": refused("127.0.0.1.*(refused|Refused)"),
    "https://127.0.0.1:PORT_html": refused("127.0.0.1"),
    "http://no.such.host.invalid:5000": refused("no.such.host.invalid"),
    "http://": refused("tracking.uri"),
    "http://[::1": refused("tracking.uri"),
    "http://127.0.0.1:99999": refused("99999"),
    "http://127.0.0.1:port": refused("tracking.uri"),
    "HTTP://127.0.0.1:PORT_closed": refused("tracking.uri|127.0.0.1"),
    "postgresql://me@127.0.0.1:PORT_closed/db": refused("127.0.0.1|postgresql"),
    "postgres://me@127.0.0.1:PORT_closed/db": refused("postgres"),
    "mysql://me@127.0.0.1:PORT_closed/db": refused("mysql|MySQL"),
    "mssql://me@127.0.0.1/db": refused("mssql"),
    "databricks": refused("databricks"),
    "databricks://profile": refused("databricks"),
    "uc:nothing": refused("uc"),
    "ftp://127.0.0.1/x": refused("ftp"),
    "nonsense": refused("nonsense"),
    "nonsense://x": refused("nonsense"),
    "://": refused("tracking.uri"),
    "file:///dev/null/x": refused("/dev/null/x"),
    "/dev/null/x": refused("/dev/null/x"),
    "sqlite://": refused("sqlite"),
    "sqlite:///": refused("sqlite"),
    "sqlite:///:memory:": refused("sqlite|memory"),
    "sqlite:////dev/null/x.db": refused("/dev/null"),
    "sqlite:////proc/x.db": refused("/proc"),
    "sqlite:///out": refused("out"),
    "sqlite:////etc/passwd": refused("passwd"),
    "sqlite:///out/mlflow.db?mode=memory": refused("mlflow.db"),
    "s3://bucket/x": refused("s3"),
}
STORES = ("a b.db", "100%.db", "%41.db", "what?.db", "a#b.db", "it's.db", "a,b=c.db", "tüb.db",
          "a:b@c.db")  # fmt: skip
SECRET = {
    f"http://me:{PASSWORD}@127.0.0.1:PORT_401": refused("401|MLFLOW_TRACKING_USERNAME"),
    f"http://me:{PASSWORD}@127.0.0.1:PORT_closed": refused("127.0.0.1"),
    f"http://me:{PASSWORD}@no.such.host.invalid:5000": refused("no.such.host"),
    f"postgresql://me:{PASSWORD}@127.0.0.1:PORT_closed/db": refused("127.0.0.1|postgres"),
    f"mysql+pymysql://me:{PASSWORD}@127.0.0.1:PORT_closed/db": refused(""),
    f"nonsense://me:{PASSWORD}@127.0.0.1/x": refused("nonsense"),
}
# A real server, on a store that is ready, for as long as the command runs.
SERVED = (
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false python -m mlflow server --host 127.0.0.1"
    " --port PORT_free --workers 1 --backend-store-uri sqlite:///out/mlflow.db"
    " --artifacts-destination out/mlflow-artifacts > /dev/null 2>&1 & server=$!; until python -c"
    " 'import urllib.request; urllib.request.urlopen(\"http://127.0.0.1:PORT_free/health\")'"
    " 2> /dev/null; do sleep 0.5; done; {}; code=$?; kill $server; wait $server; exit $code"
)


def cases() -> list[Case]:
    select = ("-m", "analysis.selection", f"study={WHOLE}")
    answers = {
        **{name: refused(SAYS.get(name, "127.0.0.1")) for name in ANSWERS},
        **dict.fromkeys((SILENT, CLOSING, GARBAGE), refused("127.0.0.1")),
    }
    by_command = {"tune": TUNE, "selection": select}
    return [
        *(
            Case(f"addresses: a server that answers {name}: {command}", command, expected,
                 words=words, options=(f"tracking.uri={LOCAL}{name}",), needs=WHOLE)
            for name, expected in answers.items()
            for command, words in by_command.items()
        ),
        *(
            Case(f"addresses: {uri}: {command}", command, expected,
                 words=words, options=(f"tracking.uri={uri}",), needs=WHOLE)
            for uri, expected in URIS.items()
            for command, words in by_command.items()
        ),
        *(
            Case(f"addresses: sqlite:///{name}: tune", "tune", in_path(name),
                 options=(f"tracking.uri=sqlite:///{name}",), leaves=(f"cwd/{name}",), fresh=True)
            for name in STORES
        ),
        *(
            Case(f"addresses: sqlite:///{name}, read: selection", "selection", in_path(name),
                 prepare=lambda place, name=name: (place.cwd / "out/mlflow.db").rename(
                     place.cwd / name),
                 options=(f"tracking.uri=sqlite:///{name}",))
            for name in STORES
        ),
        *(
            Case(f"addresses: a password in {uri}: {command}", command, expected, secret=True,
                 words=words, options=(f"tracking.uri={uri}",), needs=WHOLE)
            for uri, expected in SECRET.items()
            for command, words in by_command.items()
        ),
        *(
            Case(f"addresses: a password in {name}={uri}: tune", "tune", expected, words=TUNE,
                 env={name: uri}, secret=True)
            for name, uri, expected in (
                ("MLFLOW_TRACKING_URI", f"http://me:{PASSWORD}@127.0.0.1:PORT_401",
                 refused("401|MLFLOW_TRACKING_USERNAME")),
                ("http_proxy", f"http://me:{PASSWORD}@127.0.0.1:PORT_closed", WORKS),
            )
        ),
        Case("addresses: a password for a server that takes it: tune", secret=True, shell=SERVED,
             options=(f"tracking.uri=http://me:{PASSWORD}@127.0.0.1:PORT_free",)),
        Case("addresses: a password for a server that takes it: selection", "selection",
             shell=SERVED, secret=True,
             options=(f"tracking.uri=http://me:{PASSWORD}@127.0.0.1:PORT_free",)),
        Case("addresses: a password in searcher.storage: tune", "tune", refused("storage"),
             words=TUNE, secret=True, options=(
                 f"searcher.storage=postgresql://me:{PASSWORD}@127.0.0.1:PORT_closed/db",)),
        *(
            Case(f"addresses: searcher.storage={storage}: tune", "tune", refused("storage"),
                 words=TUNE, options=(f"searcher.storage={storage}",))
            for storage in ("nonsense", "nonsense://x", "sqlite:////dev/null/x.db", "",
                            "redis://127.0.0.1:PORT_closed", "http://127.0.0.1:PORT_html")
        ),
        *(
            Case(f"addresses: cluster.address={address}: tune", "tune",
                 refused("cluster.address"), words=TUNE, options=(f"cluster.address={address}",))
            for address in ("127.0.0.1:PORT_closed", "127.0.0.1:PORT_silent",
                            "127.0.0.1:PORT_html", "ray://127.0.0.1:PORT_closed", "auto",
                            "no.such.host.invalid:6379", "nonsense", "local", "", "1")
        ),
    ]  # fmt: skip
