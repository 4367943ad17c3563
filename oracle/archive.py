"""Pack everything that a port needs into one archive, readable without Python and safetensors.

    python oracle/archive.py --out stop-oracle.tar.gz

In it: the texts, certify with what it needs (`python3 -I certify.py DIR`, the standard library is
enough), the schemas, the vectors, the base models' weights as JSON beside the original checkpoints
(float32 numbers that come back bit for bit, and the bytes of MXFP4 blocks and scales), and
SHA256SUMS. The same content gives the same bytes.
"""
import dataclasses
import gzip
import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE / "making")]  # the root has the rooms
import cases  # noqa: E402
import manifest  # noqa: E402
from plumbing.command_line import command_line, option  # noqa: E402
from plumbing.files import require_target  # noqa: E402
from plumbing.records import write_atomic  # noqa: E402
from vector_files import checkpoint_in_json, to_json  # noqa: E402

TEXTS = ("README.md", "PORTING.md", "CHANGELOG.md", "CLAUSES.md")
CERTIFY = ("certify.py", "compare.py", "causes.py", "digest.py", "hand_in.py", "ask.py",
           "rounded.py", "rounding.py")
COMMAND = ("python oracle/certify.py", "python3 -I certify.py")  # in the project; in the archive
FOLDERS = ("schemas", "vectors", "golden/checkpoints", "golden/mxfp4")


@dataclasses.dataclass
class Settings:
    """What `python oracle/archive.py` can be told."""
    out: str = option(f"stop-oracle-{manifest.VERSION}.tar.gz", "file to write")


def contents():
    """{name in the archive: bytes}."""
    files = {}
    for name in CERTIFY:
        files[name] = (HERE / name).read_bytes()
    for name in TEXTS:
        files[name] = (HERE / name).read_text().replace(*COMMAND).encode()
    golden = [case for case in cases.BY_NAME.values() if case.golden is not None]
    for folder in [*FOLDERS, *sorted({case.stop_name for case in golden})]:
        for file in sorted((HERE / folder).rglob("*")):
            if file.is_file():
                files[str(file.relative_to(HERE))] = file.read_bytes()
    for checkpoint in sorted({case.checkpoint for case in cases.CASES}):
        case = next(case for case in cases.CASES if case.checkpoint == checkpoint)
        text = to_json(checkpoint_in_json(case.model(), HERE / checkpoint))
        files[f"{checkpoint}/weights.json"] = text.encode()
    sums = []
    for name, content in sorted(files.items()):
        sums.append(f"{hashlib.sha256(content).hexdigest()}  {name}\n")
    files["SHA256SUMS"] = "".join(sums).encode()
    return files


def pack(files):
    """The bytes of a tar.gz without dates and owners."""
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as compressed:
        with tarfile.open(fileobj=compressed, mode="w") as archive:
            for name, content in sorted(files.items()):
                entry = tarfile.TarInfo(f"stop-oracle-{manifest.VERSION}/{name}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def main(settings):
    """Write the archive; the last line says how large it is, and its digest."""
    require_target(settings.out)
    content = pack(contents())
    write_atomic(settings.out, content)
    print(json.dumps({
        "out": settings.out,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest()}))


if __name__ == "__main__":
    command_line(Settings, main)
