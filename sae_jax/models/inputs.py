"""What models are shown: text, images, protein and DNA sequences: a user's, a dataset of the hub's, or built in.

A source is named by a string: the path of a file (text or FASTA) or folder (images); `hf:OWNER/NAME` for the training
split of a Hugging Face dataset with a column `text`, `image` or `sequence`; or nothing for what comes with the machine:
Python's documentation; variable domains of three therapeutic antibodies with one residue in seven replaced at random,
and DNA that codes for them; random crops of scikit-image's photos. The built-in ones stand in for a corpus in demos and
tests; sequences and crops never end.
"""

import ast
import codecs
import hashlib
import importlib.metadata
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np

from sae_jax.errors import Refused
from sae_jax.runtime.optional import module, package

PIECE = 2**20  # characters of a text that are read at a time: a corpus may be larger than memory
MIN_DOCSTRING = 200  # characters: shorter ones are labels, not prose
AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
CODONS = {
    "A": "GCG", "C": "TGC", "D": "GAT", "E": "GAA", "F": "TTT", "G": "GGC", "H": "CAT", "I": "ATT", "K": "AAA",
    "L": "CTG", "M": "ATG", "N": "AAC", "P": "CCG", "Q": "CAG", "R": "CGT", "S": "AGC", "T": "ACC", "V": "GTG",
    "W": "TGG", "Y": "TAT",
}  # fmt: skip
# Heavy and light variable domains of trastuzumab, adalimumab and bevacizumab, as published in their patents.
ANTIBODIES = (
    "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVYYCSRWGGDGFYAMDYWGQGTLVTVSS",
    "DIQMTQSPSSLSASVGDRVTITCRASQDVNTAVAWYQQKPGKAPKLLIYSASFLYSGVPSRFSGSRSGTDFTLTISSLQPEDFATYYCQQHYTTPPTFGQGTKVEIK",
    "EVQLVESGGGLVQPGRSLRLSCAASGFTFDDYAMHWVRQAPGKGLEWVSAITWNSGHIDYADSVEGRFTISRDNAKNSLYLQMNSLRAEDTAVYYCAKVSYLSTASSLDYWGQGTLVTVSS",
    "DIQMTQSPSSLSASVGDRVTITCRASQGIRNYLAWYQQKPGKAPKLLIYAASTLQSGVPSRFSGSGSGTDFTLTISSLQPEDVATYYCQRYNRAPYTFGQGTKVEIK",
    "EVQLVESGGGLVQPGGSLRLSCAASGYTFTNYGMNWVRQAPGKGLEWVGWINTYTGEPTYAADFKRRFTFSLDTSKSTAYLQMNSLRAEDTAVYYCAKYPHYYGSSHWYFDVWGQGTLVTVSS",
    "DIQMTQSPSSLSASVGDRVTITCSASQDISNYLNWYQQKPGKAPKVLIYFTSSLHSGVPSRFSGSGSGTDFTLTISSLQPEDFATYYCQQYSTVPWTFGQGTKVEIK",
)
VARIANTS = 16  # of one antibody in a row
PHOTOS = (
    "astronaut.png", "brick.png", "chelsea.png", "coffee.png", "grass.png", "gravel.png", "hubble_deep_field.jpg",
    "ihc.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip
IMAGE_FILES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
COLUMN = {"text": "text", "images": "image", "proteins": "sequence", "dna": "sequence"}
HUB = "hf:"


def read(kind: str, source: str) -> Iterator[Any]:
    """Documents (str), sequences (str) or images (H, W, 3) uint8, always in one order.

    Raises:
      Refused: the source is not there, or holds nothing of the kind.
    """
    try:
        if source.startswith(HUB):
            yield from _from_hub(kind, source)
        elif source:
            yield from {"text": _documents, "images": _images, "proteins": _fasta, "dna": _fasta}[kind](Path(source))
        elif kind == "text":
            yield from _documentation()
        elif kind == "images":
            yield from _crops(np.random.default_rng(0))
        else:
            for sequence in _antibodies(np.random.default_rng(0)):
                yield sequence if kind == "proteins" else "".join(map(CODONS.__getitem__, sequence))
    except Refused:
        raise
    except (OSError, ValueError) as error:
        raise Refused(f"data.model.{kind}", source, f"{kind} that can be read ({error})") from error


def identity(kind: str, source: str) -> str:
    """What `read` yields. A file is gone through, so that what cannot be read is refused before there is a result."""
    path = Path(source)
    try:
        if source.startswith(HUB):
            return source
        if source and path.is_dir():
            listing = [(str(file.relative_to(path)), file.stat().st_size) for file in _image_files(path)]
            return "files " + hashlib.sha256(repr(listing).encode()).hexdigest()
        if source:
            pieces = sum(1 for _ in read(kind, source)) if kind != "images" else 0
            with path.open("rb") as file:
                marked = kind == "text" and file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
                file.seek(0)
                how = " in pieces" if kind == "text" and pieces > 1 else " without its mark" if marked else ""
                return "sha256 " + hashlib.file_digest(file, "sha256").hexdigest() + how
    except OSError as error:
        raise Refused(f"data.model.{kind}", source, f"{kind} that can be read ({error})") from error
    if kind == "text":
        return f"documentation of Python {platform.python_version()}"
    if kind == "images":
        package("skimage", "models")
        return f"photos of scikit-image {importlib.metadata.version('scikit-image')}"
    return f"{kind}: variants of six antibody domains"


# -- a user's own ----------------------------------------------------------------------------------------------------


def _documents(path: Path) -> Iterator[str]:
    """A text, a long one in pieces. They are cut at blank lines, which come back between documents; where
    a piece has none, at the end of a line, of a word, or of the piece."""
    with path.open(encoding="utf-8-sig") as file:  # a mark of the byte order, as editors leave one, is no text
        held = file.read(PIECE)
        while more := file.read(PIECE):
            at, seam = _seam(held)
            yield held[:at]
            held = held[at + seam :] + more
        yield held


def _seam(text: str) -> tuple[int, int]:
    """Where to cut, and how many characters fall between: of a blank line, the end of a line, a space, or nothing."""
    for mark in ("\n\n", "\n", " "):
        if (at := text.rfind(mark, 1, len(text) + len(mark) - 2)) > 0:  # the last line's end may be half a blank line
            return at, len(mark)
    return len(text), 0


def _fasta(path: Path) -> Iterator[str]:
    """Sequences of a FASTA file (or of one without headers, one a line)."""
    held: list[str] = []
    headed: bool | None = None
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(map(str.strip, file), 1):
            header = line.startswith(">")
            if not header and not line.isascii():
                raise ValueError(f"line {number} is not ASCII")
            if not line:
                continue
            if headed is None:
                headed = header
            if header and not headed:
                raise ValueError(f"line {number} is a header, and the first line is not one")
            if not headed:
                yield line
            elif not header:
                held.append(line)
            elif held:
                yield "".join(held)
                held = []
    if held:
        yield "".join(held)


def _image_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_FILES)


def _images(folder: Path) -> Iterator[np.ndarray]:
    image = module("PIL.Image", "models")
    files = _image_files(folder)
    if not files:
        raise Refused("data.model.images", str(folder), f"a folder with images ({', '.join(IMAGE_FILES)})")
    for file in files:
        yield np.asarray(image.open(file).convert("RGB"))


def _from_hub(kind: str, source: str) -> Iterator[Any]:
    library = module("datasets", "models")
    try:
        rows = library.load_dataset(source.removeprefix(HUB), split="train", streaming=True)
        for row in rows:
            value = row[COLUMN[kind]]
            yield np.asarray(value.convert("RGB")) if kind == "images" else value
    except (KeyError, ValueError, ConnectionError) as error:
        allowed = f"a dataset with a training split and a column {COLUMN[kind]!r} ({error})"
        raise Refused(f"data.model.{kind}", source, allowed) from error


# -- built in --------------------------------------------------------------------------------------------------------


def _documentation() -> Iterator[str]:
    """The language reference's topics and the standard library's docstrings: English text that every Python has."""
    yield from (topics[name] for name in sorted(topics))
    library = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data"}
    for file in sorted(library.rglob("*.py")):
        if not skipped & set(file.relative_to(library).parts):
            yield from docstrings(file)


def docstrings(file: Path) -> Iterator[str]:
    """Those of a file of Python that are of some length."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= MIN_DOCSTRING:
                yield text


def _antibodies(rng: np.random.Generator) -> Iterator[str]:
    letters = np.array(list(AMINO_ACIDS))
    while True:
        variants = np.tile(np.array(list(ANTIBODIES[rng.integers(len(ANTIBODIES))])), (VARIANTS, 1))
        variants = np.where(rng.random(variants.shape) < 1 / 7, rng.choice(letters, variants.shape), variants)
        yield from map("".join, variants)


def _crops(rng: np.random.Generator) -> Iterator[np.ndarray]:
    image, folder = module("PIL.Image", "models"), package("skimage", "models") / "data"
    photos = [np.asarray(image.open(folder / name).convert("RGB")) for name in PHOTOS]
    while True:
        photo = photos[rng.integers(len(photos))]
        side = int(rng.integers(min(160, *photo.shape[:2]), min(photo.shape[:2]) + 1))
        top, left = (int(rng.integers(0, n - side + 1)) for n in photo.shape[:2])
        yield photo[top : top + side, left : left + side]
