"""Zip archives from elsewhere (torch checkpoints, TorchScript, torch.export), looked at before anything reads them.

An exported program (`.pt2`) holds more that can run than pickles: torch.export evaluates its size expressions and
guards as Python, imports classes that it names and looks operations up by name. `vetted` lets known forms through,
drops what is not needed and hands torch an archive of its own making.
"""

import ast
import io
import json
import re
import stat
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from zskt.errors import ZsktError, cannot, first_line

MOST_MEMBERS = 100_000
MOST_BYTES = 2**36
"""64 GiB in all, unpacked."""
MOST_EXPANSION = 100
"""Unpacked bytes of a member per packed one; torch does not compress at all."""

Kind = Literal["weights", "TorchScript", "exported program"]


def open_archive(path: Path) -> zipfile.ZipFile:
    """A zip archive whose directory is harmless; the caller closes it.

    Raises ZsktError for absolute names or `..`, symbolic links, names given twice, and more than MOST_MEMBERS members,
    MOST_BYTES or MOST_EXPANSION, all before any member is read.
    """
    try:
        archive = zipfile.ZipFile(path)
    except OSError as error:
        raise cannot("read", path, error) from error
    except Exception as error:  # a damaged archive can raise nearly anything
        raise ZsktError(f"{path} is a damaged archive ({first_line(error)}); fetch or save it again") from error
    members = archive.infolist()
    names = [member.filename for member in members]
    checks: list[tuple[str, Callable[[zipfile.ZipInfo], bool]]] = [
        ("an absolute path", lambda m: bool(re.match(r"[/\\]|[A-Za-z]:", m.filename))),
        ("a path out of the archive", lambda m: ".." in re.split(r"[/\\]", m.filename)),
        ("a symbolic link", lambda m: stat.S_ISLNK(m.external_attr >> 16)),
        (f"a member of over {MOST_BYTES:,} bytes", lambda m: m.file_size > MOST_BYTES),
        ("a decompression bomb", lambda m: m.file_size > MOST_EXPANSION * (m.compress_size + 1_000)),
    ]
    wrong = next((f"{what}, {m.filename[:80]!r}" for m in members for what, bad in checks if bad(m)), None)
    if len(members) > MOST_MEMBERS:
        wrong = f"{len(members):,} members, more than {MOST_MEMBERS:,}"
    elif wrong is None and len(set(names)) < len(names):
        wrong = "several members of one name"
    elif wrong is None and (total := sum(member.file_size for member in members)) > MOST_BYTES:
        wrong = f"{total:,} bytes in all, more than {MOST_BYTES:,}"
    elif wrong is None and sum(member.compress_size for member in members) > path.stat().st_size:
        wrong = "members that share their bytes"
    if wrong is not None:
        archive.close()
        raise ZsktError(f"{path} is refused: expected a plain archive, found {wrong}; fetch it from a place you trust")
    return archive


def kind_of(path: Path) -> Kind:
    """What a file of torch's holds; whatever is no zip archive can only be weights."""
    if not zipfile.is_zipfile(path):
        return "weights"
    with open_archive(path) as archive:
        names = {name.partition("/")[2] or name for name in archive.namelist()}
    if names & {"archive_format", "models/model.json", "serialized_exported_program.json"}:
        return "exported program"
    return "TorchScript" if "constants.pkl" in names else "weights"


# Exported programs

_KEPT = re.compile(
    r"archive_format|archive_version|byteorder|\.data/(version|serialization_id)|models/model\.json|"
    r"data/sample_inputs/model\.pt|data/weights/(weight_\d+|model_weights_config\.json)|"
    r"data/constants/(tensor_\d+|model_constants_config\.json)"
)
_PLAIN = re.compile(r"[\w.:,>\- ]*")  # no quotes, brackets, = or line ends: nothing that could run, wherever it lands
_TARGET = re.compile(r"torch\.ops\.aten\.([a-z_]\w*)\.([A-Za-z]\w*)")
_ARITHMETIC = re.compile(
    r"_operator\.(add|sub|mul|mod|floordiv|truediv|neg|pos|eq|ne|ge|gt|le|lt|getitem|and_|or_)|math\.(ceil|floor|trunc)|"
    r"torch\.sym_(int|float|max|min|not|ite)"
)
_UNCHECKED = re.compile(  # operations that touch files, or kernels that trust sizes and indices they are given
    r"(set|resize|as_strided|batch_norm|native_batch_norm|fractional)_.*|set|resize|data|from_file|save|segment_reduce|"
    r".*(backward|sparse|quantiz|nested|mkldnn|fbgemm|cudnn|miopen|mps).*"
)
_PRIVATE = {  # of the names with an underscore in front, which are internals, those that exported classifiers hold
    "_adaptive_avg_pool2d", "_assert_scalar", "_assert_tensor_metadata", "_log_softmax", "_softmax", "_to_copy",
    "_unsafe_view", "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa",
    "_native_batch_norm_legit_functional", "_native_batch_norm_legit_no_training",  # unchecked: for `graphs` to replace
}  # fmt: skip
_IN_PLACE = {  # beside those that torch itself calls pointwise
    "alpha_dropout_", "copy_", "dropout_", "feature_dropout_", "fill_", "hardswish_", "index_put_", "masked_fill_",
    "mish_", "rrelu_", "zero_",
}  # fmt: skip
_FUNCTIONS = {
    "Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Max", "Min", "Mod", "PythonMod", "FloorDiv", "CeilDiv",
    "CleanDiv", "IntTrueDiv", "ModularIndexing", "CeilToInt", "FloorToInt", "TruncToInt", "ToFloat", "Where",
    "Identity", "Equality", "Unequality", "StrictLessThan", "StrictGreaterThan", "LessThan", "GreaterThan",
}  # fmt: skip
_CONTAINERS = {None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"}


class _Suspicious(Exception):
    """What a plain exported classifier does not hold."""


def vetted(path: Path) -> io.BytesIO:
    """A `.pt2` archive rebuilt from those parts of `path` that cannot run anything, for torch.export.load.

    Its one pickle passes weights-only loading, tensors are raw bytes, operations are arithmetic and such of torch's own
    (`aten`) as stay inside their tensors, size expressions are sums and products of symbols. Guards and debugging notes
    are dropped. Raises ZsktError otherwise.
    """
    rebuilt = io.BytesIO()
    with open_archive(path) as archive, zipfile.ZipFile(rebuilt, "w") as copy:
        try:
            for member in archive.infolist():
                name = member.filename.partition("/")[2]
                if not _KEPT.fullmatch(name):
                    if not name.startswith("extra/"):
                        raise _Suspicious(f"{member.filename[:80]!r}, which no plain exported program has")
                    continue
                content = archive.read(member)
                if name.endswith(".pt"):
                    _check_pickle(content)
                elif name.endswith(".json"):
                    content = json.dumps(_checked(json.loads(content))).encode()
                copy.writestr(member.filename, content)
        except _Suspicious as error:
            raise ZsktError(
                f"{path} is refused: it holds {error}, and loading it could run code; --trust loads it if you trust "
                "its maker"
            ) from error
        except Exception as error:  # damaged in any way, or nested too deeply
            raise ZsktError(f"{path} is damaged ({first_line(error)}); fetch or export it again") from error
    rebuilt.seek(0)
    return rebuilt


def _check_pickle(content: bytes) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        raise _Suspicious(f"a pickle that wants to run {wanted[1]}" if wanted else "a pickle of no weights") from error


def _checked(value: Any, key: str = "") -> Any:
    """A JSON value without what is not needed; raises _Suspicious for what could run."""
    if key == "metadata":
        return {}
    if isinstance(value, dict):
        if strange := [name for name in value if not _PLAIN.fullmatch(name)]:
            raise _Suspicious(f"the name {strange[0][:80]!r}")
        return {name: _checked(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [] if key == "guards_code" else [_checked(item, key) for item in value]
    if key == "use_pickle" and value is not False:
        raise _Suspicious("tensors as pickles")
    if isinstance(value, str):
        _check_text(key, value)
    return value


def _check_text(key: str, text: str) -> None:
    if key in ("target", "as_operator"):
        operation = _TARGET.fullmatch(text)
        if not (_stays_in_bounds(operation[1], operation[2]) if operation else _ARITHMETIC.fullmatch(text)):
            raise _Suspicious(f"the operation {text[:80]!r}")
    elif key == "expr_str":
        try:
            _check_expression(ast.parse(text, mode="eval").body)
        except SyntaxError as error:
            raise _Suspicious(f"the size {text[:80]!r}") from error
    elif key in ("in_spec", "out_spec"):
        _check_structure(json.loads(text)[1])
    elif key != "torch_version" and not _PLAIN.fullmatch(text):
        raise _Suspicious(f"the text {text[:80]!r}")


def _stays_in_bounds(name: str, overload: str) -> bool:
    """Whether this operation of torch's reads and writes nothing but the elements of its tensors.

    In place it may only work element by element: views are checked when they are made, so that such a write stays
    inside the file's own tensors.
    """
    found = getattr(getattr(torch.ops.aten, name, None), overload, None)
    if not isinstance(found, torch._ops.OpOverload) or _UNCHECKED.fullmatch(name):
        return False
    if name.startswith("_"):
        return name in _PRIVATE
    written = [argument.name for argument in found._schema.arguments if argument.is_write]
    return not written or (written == ["self"] and (name in _IN_PLACE or torch.Tag.pointwise in found.tags))


def _check_expression(node: ast.expr) -> None:
    """Sizes are numbers, Symbol('s0', positive=True), and sums, products and quotients of them."""
    match node:
        case ast.Constant(value=bool() | int() | float()):
            return
        case ast.Constant(value=str() as name) if name.isidentifier():
            return
        case ast.Name(id=name) if re.fullmatch(r"[a-z]{1,3}\d+", name):
            return
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return _check_expression(inner)
        case ast.BinOp(op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div() | ast.FloorDiv() | ast.Mod(), left=a, right=b):
            _check_expression(a)
            return _check_expression(b)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=keywords) if name in _FUNCTIONS:
            for argument in (*arguments, *(keyword.value for keyword in keywords if keyword.arg)):
                _check_expression(argument)
            if all(keyword.arg for keyword in keywords):
                return
    raise _Suspicious(f"the size {ast.unparse(node)[:80]!r}")


def _check_structure(spec: Any) -> None:
    """How inputs and outputs are nested: tuples, lists and dictionaries with plain keys."""
    if spec["type"] not in _CONTAINERS:
        raise _Suspicious(f"inputs or outputs of type {str(spec['type'])[:80]!r}")
    keys = json.loads(spec["context"] or "null")
    if keys is not None and not (isinstance(keys, list) and all(re.fullmatch(r"\w+", key) for key in keys)):
        raise _Suspicious(f"inputs or outputs with {str(keys)[:80]!r}")
    for child in spec["children_spec"]:
        _check_structure(child)
