"""Foreign weights -> a teacher: find the state dict, map its names to ours, load, check.

The mapping is by name; shapes only confirm it, and order never matters. A renaming maps each name component (between
dots) to one component of ours, the same wherever it occurs; leading components (`module.`, `backbone.`, `head.`) may be
dropped. Numbers and the last component (`weight`, `running_mean`, ...) stay as they are. The renaming must send every
tensor to one of ours of equal shape, fill all of ours, and be unique: where shapes leave a choice, only components that
are equal on both sides settle it, and anything else is refused with the candidates.
"""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor, nn

from zskt.errors import UsageError, ZsktError, short, unknown
from zskt.networks import models
from zskt.networks.archives import read_weights
from zskt.networks.checks import as_teacher
from zskt.networks.classifier import Classifier, unit_normalisation
from zskt.networks.suggestions import COUNTER, suggest

NOT_MEASURED = "names and shapes fit, which is no proof: accuracy not measured; give --data to measure it"

ADVICE = "check --model, --num-classes, --input-size, or give --rename A=B (A= drops A, A=- omits its tensors)"

_FINAL = "="  # marks a component that --rename has set
_MOST_SEARCHES = 500  # nodes; real networks need a few dozen, even if every name differs

_Values = Sequence[float]
_Path = tuple[str, ...]
_Layers = dict[_Path, dict[str, tuple[int, ...]]]  # path of a module -> last component of the key -> shape


@dataclass(frozen=True)
class ImportReport:
    """What `import_weights` did: `metadata` for teacher.json, `notices` for the user."""

    metadata: dict[str, object]
    notices: tuple[str, ...]


class _NothingFits(ZsktError):
    """No renaming sends every tensor to one of ours."""


@dataclass(frozen=True)
class _Choice:
    """A possible target for a foreign module, and what each component of its path becomes there ("": dropped)."""

    source: _Path
    target: _Path
    becomes: dict[str, str]


def find_state_dict(loaded: object, key: str = "") -> dict[str, Tensor]:
    """The largest mapping name -> tensor, however nested; ZsktError if there is none, or several as large.

    `key` limits it to one entry of the file, as in ema_state_dict, or to names that begin with it, as in teacher.
    """
    found: dict[str, dict[str, Tensor]] = {}
    waiting: list[tuple[str, object]] = [("", loaded)]
    seen: set[int] = set()  # no recursion, as a hostile file may nest deeply or in circles
    while waiting:
        place, value = waiting.pop()
        if not isinstance(value, Mapping) or id(value) in seen or "param_groups" in value:
            continue
        seen.add(id(value))
        items = list(type(value).items(value))  # a file can shadow methods by attributes
        if items and all(isinstance(name, str) and isinstance(item, Tensor) for name, item in items):
            found[place or "the top level"] = {name: Tensor.detach(item) for name, item in items}
        waiting += [(f"{place}.{name}" if place else str(name), item) for name, item in items]
    if not found:
        what = f"entries {_some(loaded)}" if isinstance(loaded, Mapping) else f"a {type(loaded).__name__}"
        raise ZsktError(f"expected a state dict (names -> tensors), found {what}; save only model.state_dict()")
    if key:
        found = _under(key, found)
    most = max(map(len, found.values()))
    best = sorted(place for place, tensors in found.items() if len(tensors) == most)
    if len(best) > 1:
        raise ZsktError(
            f"expected one state dict, found {len(best)} of {most} tensors: {_some(best)}; "
            f"choose one by --teacher-key {best[0]} (with zskt import --key {best[0]}), or save only one"
        )
    return found[best[0]]


def _under(key: str, found: Mapping[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """What is left of each state dict, by its place in the file, under `key`."""
    left: dict[str, dict[str, Tensor]] = {}
    for place, tensors in found.items():
        inside = place == key or place.startswith(f"{key}.")
        for start in ("",) if inside else (f"{key}.", key.removeprefix(f"{place}.") + "."):
            named = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
            if named:
                left.setdefault(place, named)
    if not left:
        firsts = {name.partition(".")[0] for tensors in found.values() for name in tensors}
        raise unknown("part of the file", key, sorted({*found, *firsts} - {"the top level"}))
    return left


def parse_renames(entries: Iterable[str]) -> dict[str, str]:
    """`--rename` entries: A=B renames component A to B, A= drops it, A=- omits every tensor with A in its name.

    Either side may be several components joined by dots (`downsample.0=shortcut`). Raises UsageError for anything else.
    """
    rename: dict[str, str] = {}
    for entry in entries:
        old, equals, new = entry.partition("=")
        if not equals or "=" in new or not all(old.split(".")) or (new and not all(new.split("."))):
            raise UsageError(f"--rename {entry!r}: expected A=B, A= (drops A) or A=- (omits the tensors with A)")
        if rename.setdefault(old, new) != new:
            raise UsageError(f"--rename: {old!r} is given twice, as {rename[old]!r} and as {new!r}; keep one")
    return rename


def find_renaming(
    foreign: Mapping[str, Sequence[int]],
    own: Mapping[str, Sequence[int]],
    rename: Mapping[str, str] | None = None,
    advice: str = ADVICE,
) -> dict[str, str]:
    """Foreign key -> own key, by the only consistent renaming that fits all shapes (see the module's docstring).

    `foreign` and `own` map keys to shapes; `rename` (see `parse_renames`) is applied first and is final.
    `num_batches_tracked` may be missing. Raises ZsktError if no renaming fits or several do, UsageError for a `rename`
    entry that matches nothing.
    """
    parts = _apply(rename or {}, foreign, own)
    theirs, ours = _layers(parts, foreign), _layers({key: tuple(key.split(".")) for key in own}, own)
    rows = [_choices(path, leaves, ours) for path, leaves in theirs.items()]
    chosen = _only_solution(rows) if len(theirs) == len(ours) else None
    if chosen is None:
        raise _NothingFits(f"{_why_none(theirs, ours, [choice for row in rows for choice in row])}; {advice}")
    target = {choice.source: choice.target for choice in chosen}
    return {key: ".".join((*target[path[:-1]], path[-1])) for key, path in parts.items()}


@torch.random.fork_rng(devices=[])  # networks are built with random weights first
def import_weights(
    path: Path,
    spec: str,
    input_size: tuple[int, int, int],
    num_classes: int,
    mean: _Values,
    std: _Values,
    rename: Mapping[str, str] | None = None,
    key: str = "",
) -> tuple[Classifier, ImportReport]:
    """A foreign checkpoint as a `Classifier` of our network `spec` for images (C, H, W) and `num_classes` classes.

    `mean` and `std` are per channel, in [0, 1] or 0..255; `key` is for `find_state_dict`. No code in the file is run.
    Raises ZsktError for an unreadable file, names that do not map (and says which model they might fit), and tensors
    that are not finite floating-point numbers.
    """
    mean, std, notices = unit_normalisation(mean, std)
    module = models.build(spec, num_classes, input_size)
    foreign = read_state_dict(path, key)
    try:
        keys = _fill(module, foreign, rename, ADVICE)
    except _NothingFits as error:
        hint = suggest({name: tensor.shape for name, tensor in foreign.items()}, spec, input_size, num_classes)
        raise ZsktError(f"{error}; {hint}" if hint else str(error)) from error
    teacher = as_teacher(Classifier(module, input_size=input_size, mean=mean, std=std), copied=False)
    if renamed := _renamed(keys):
        changes = ", ".join(f"{old} -> {new}" if new else f"{old} dropped" for old, new in renamed.items())
        notices = (*notices, f"{len(keys)} tensors mapped by name: {changes}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return teacher, ImportReport({"imported_from": path.name, "sha256": digest, "renamed": renamed}, notices)


@torch.random.fork_rng(devices=[])
def with_module(teacher: Classifier, spec: str) -> Classifier:
    """The teacher's tensors in another network of ours, which has the same names and shapes."""
    module = models.build(spec, teacher.num_classes, teacher.input_size)
    module.load_state_dict(teacher.module.state_dict())
    mean, std = teacher.mean.flatten().tolist(), teacher.std.flatten().tolist()
    return as_teacher(Classifier(module, input_size=teacher.input_size, mean=mean, std=std), copied=False)


def fill(
    module: nn.Module, path: Path, rename: Mapping[str, str] | None = None, advice: str = ADVICE, key: str = ""
) -> dict[str, str]:
    """Load a foreign checkpoint into `module`; returns foreign key -> own key, or raises ZsktError with `advice`.

    `key` is for `find_state_dict`.
    """
    return _fill(module, read_state_dict(path, key), rename, advice)


def read_state_dict(path: Path, key: str = "") -> dict[str, Tensor]:
    """What `find_state_dict` finds in a file, of dense tensors."""
    foreign = find_state_dict(read_weights(path), key)
    if nested := [key for key, tensor in foreign.items() if tensor.is_nested]:
        raise ZsktError(f"{short(nested[0])}: expected a dense tensor, found a nested one; convert and save it again")
    return foreign


def _fill(
    module: nn.Module, foreign: Mapping[str, Tensor], rename: Mapping[str, str] | None, advice: str
) -> dict[str, str]:
    own = module.state_dict()
    keys = find_renaming({k: v.shape for k, v in foreign.items()}, {k: v.shape for k, v in own.items()}, rename, advice)
    weights = {name: torch.zeros_like(tensor) for name, tensor in own.items() if name.endswith(COUNTER)}
    weights |= {name: _checked(key, foreign[key], own[name]) for key, name in keys.items()}
    module.load_state_dict(weights, strict=True)
    return keys


def _some(items: Iterable[object], separator: str = ", ") -> str:
    """The first four, because an error is one line."""
    names = list(map(str, items))
    return separator.join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _checked(key: str, tensor: Tensor, own: Tensor) -> Tensor:
    """`tensor` in the dtype of `own`; equal shapes are known, so a hostile size cannot get here."""
    if tensor.layout is torch.strided and not tensor.is_meta and tensor.is_floating_point() >= own.is_floating_point():
        with contextlib.suppress(RuntimeError):  # from dtypes without arithmetic, such as quantised ones
            value = tensor.to(own.dtype)
            if value.isfinite().all():
                return value
    raise ZsktError(
        f"{short(key)}: expected a dense tensor of finite floating-point numbers, found {tensor.dtype}, "
        f"{tensor.layout}, or NaN or infinity; check how it was saved"
    )


def _renamed(keys: Mapping[str, str]) -> dict[str, str]:
    """The components that changed ("": dropped), for display; the names are aligned at their ends."""
    pairs = ((key.split(".")[::-1], name.split(".")[::-1]) for key, name in keys.items())
    return {a: b for old, new in pairs for a, b in zip_longest(old, new, fillvalue="") if a not in ("", b)}


def _layers(parts: Mapping[str, _Path], shapes: Mapping[str, Sequence[int]]) -> _Layers:
    layers: _Layers = {}
    for key, (*path, leaf) in parts.items():
        if leaf in layers.setdefault(tuple(path), {}):
            raise UsageError(f"--rename gives {key!r} the name of another tensor; omit one of them with A=-")
        layers[tuple(path)][leaf] = tuple(shapes[key])
    return layers


def _apply(rename: Mapping[str, str], foreign: Iterable[str], own: Iterable[str]) -> dict[str, _Path]:
    """Foreign key -> its components after `rename`, renamed ones marked as final; the longest entry wins."""
    rules = {tuple(old.split(".")): new for old, new in rename.items()}
    own_words = {word for key in own for word in key.split(".")}
    for word in {word for new in rename.values() if new != "-" for word in new.split(".")} - own_words - {""}:
        raise unknown("component of our names in --rename", word, sorted(w for w in own_words if not w.isdecimal()))
    used: set[_Path] = set()
    parts: dict[str, _Path] = {}
    for key in foreign:
        words, at, out = tuple(key.split(".")), 0, list[str]()
        while at < len(words):
            rule = max((old for old in rules if old == words[at : at + len(old)]), key=len, default=())
            used.add(rule)
            out += [_FINAL + word for word in rules[rule].split(".") if word] if rule else [words[at]]
            at += len(rule) or 1
        if out and _FINAL + "-" not in out:
            parts[key] = (*out[:-1], out[-1].removeprefix(_FINAL))
    for rule in rules.keys() - used:
        there = sorted({word for key in foreign for word in key.split(".") if not word.isdecimal()})
        raise unknown("component of the file's names in --rename", ".".join(rule), there)
    return parts


def _choices(path: _Path, leaves: Mapping[str, tuple[int, ...]], ours: _Layers) -> list[_Choice]:
    """Every module of ours with these tensors that `path` could map to: numbers kept, extra leading parts dropped."""
    choices = []
    for target, wanted in ours.items():
        without_counter = {leaf: shape for leaf, shape in wanted.items() if leaf != COUNTER}
        surplus = len(path) - len(target)
        if surplus < 0 or leaves not in (wanted, without_counter):
            continue
        becomes: dict[str, str] = {}
        for word, new in zip(path, ("",) * surplus + target, strict=True):
            if word.isdecimal() and not new:
                continue  # nn.Sequential(normalise, network) saves `1.conv1`; a 1 elsewhere is kept
            final = word.removeprefix(_FINAL) if word.startswith(_FINAL) or word.isdecimal() else new
            if new != final or becomes.setdefault(word, new) != new:
                break
        else:
            choices.append(_Choice(path, target, becomes))
    return choices


def _only_solution(rows: list[list[_Choice]]) -> list[_Choice] | None:
    """One choice per row, or None if nothing fits. Raises ZsktError if the names allow several renamings.

    `_search` tries equal names first, so it finds the renaming that settles every free choice by equal names, if there
    is one. There is none exactly if a component that changes could also become something else.
    """
    steps = iter(range(_MOST_SEARCHES))
    chosen = _search(rows, steps)
    if chosen is None:
        return None
    first = {word: new for choice in chosen for word, new in choice.becomes.items()}
    candidates, free = [first], set[str]()
    for word, new in first.items():
        if new != word and word not in free:
            other = _search([[choice for choice in row if choice.becomes.get(word) != new] for row in rows], steps)
            if other is not None:
                candidates.append({word: new for choice in other for word, new in choice.becomes.items()})
                free |= {each for each in first if candidates[-1][each] != first[each]}
    if not free:
        return chosen
    lines = ["--rename " + " ".join(f"{word}={found[word]}" for word in sorted(free)) for found in candidates]
    raise ZsktError(f"expected one renaming, found several that fit all shapes; give one of: {_some(lines, ' | ')}")


def _search(rows: list[list[_Choice]], steps: Iterator[int]) -> list[_Choice] | None:
    """One choice per row, consistent and without repeated targets; equal names are tried first."""
    if next(steps, None) is None:
        raise ZsktError("too many ways to map the names to ours; fix some of them with --rename A=B")
    chosen: list[_Choice] = []
    while rows and all(rows):
        row, *rest = sorted(rows, key=len)
        if len(row) > 1:
            for choice in sorted(row, key=lambda each: sum(old != new for old, new in each.becomes.items())):
                found = _search([[choice], *rest], steps)
                if found is not None:
                    return chosen + found
            return None
        chosen += row
        target, fixed = row[0].target, row[0].becomes
        rows = [
            [c for c in other if c.target != target and all(fixed.get(w, new) == new for w, new in c.becomes.items())]
            for other in rest
        ]
    return None if rows else chosen


def _why_none(theirs: _Layers, ours: _Layers, choices: Sequence[_Choice]) -> str:
    """One line: which tensors match nothing or are missing."""
    unmatched = theirs.keys() - {choice.source for choice in choices}
    missing = ours.keys() - {choice.target for choice in choices}
    alone = next(iter(missing)) if len(missing) == len(unmatched) == 1 else None
    found: _Layers = {path: {} for path in ours if path in missing}
    for path in (path for path in theirs if path in unmatched):
        plain = tuple(word.removeprefix(_FINAL) for word in path)
        wrappers = next((i for i, word in enumerate(plain) if word.isdecimal()), len(plain) - 1)
        ends = (plain[cut:] for cut in range(wrappers + 1) if plain[cut:] in ours)
        found[next(ends, alone or plain)] = theirs[path]
    reasons = [
        f"{'.'.join((*path, leaf))}: expected {wanted.get(leaf, 'nothing')}, found {there.get(leaf, 'nothing')}"
        for path, there in found.items()
        for wanted in (ours.get(path, {}),)
        for leaf in {**wanted, **there}
        if wanted.get(leaf) != there.get(leaf) and (leaf != COUNTER or leaf in there)
    ]
    if not reasons:
        old, new = ({word for path in paths for word in path if not word.isdecimal()} for paths in (theirs, ours))
        parts = f"{_some(sorted(old - new)) or 'the names'} to {_some(sorted(new - old)) or 'ours'}"
        reasons = [f"expected {len(ours)} modules, found {len(theirs)}, and no consistent renaming of {parts}"]
    return f"the weights do not fit the model: {_some(reasons, '; ')}"
